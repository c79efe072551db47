"""How long conversations are in tokens."""

from typing import Any


class Ruler:
    """The lengths of conversations in tokens of the model, as its chat template renders them."""

    def __init__(self, tokenizer: Any, system_prompt: str) -> None:
        self.tokenizer, self.system_prompt = tokenizer, system_prompt

    def tokens(self, conversations: list[tuple[str, ...]]) -> list[int]:
        """Return the tokens of each (question,), with the generation prompt, and of each (question, completion)."""
        if not conversations:
            return []
        texts = []
        for spoken in conversations:
            turns = zip(("system", "user", "assistant"), (self.system_prompt, *spoken), strict=False)
            messages = [{"role": role, "content": content} for role, content in turns]
            asks = len(spoken) == 1
            texts.append(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]
