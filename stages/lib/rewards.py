"""What GRPO pays for: the two suites, the rewards for any format, and the user's own. `docs/rewards.md` explains each.

A reward is a function as TRL calls it: `f(completions, **columns)` gives one number a completion. `completions` holds
strings or conversations of one assistant message; `answer` is the dataset's column of canonical answers (`answers.py`);
`completion_ids` are the token ids of each completion. What a completion answers is what its format reads, so a reward
and `infer` never disagree. Rewards print nothing, draw nothing at random and keep no state: the caches below and the
worker of `math_correct` change how long an answer takes and not what it is.

Recipes name the functions and weigh them; TRL logs each under its name and pays the weighted sum, so that weight 0 logs
without paying.
"""

import ast
import copy
import functools
import importlib.util
import inspect
import math
import multiprocessing
import numbers
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from stages.lib import answers
from stages.lib.errors import UserError, nearest
from stages.lib.formats import THINK, XML, Format

Completion = str | list[dict[str, Any]]
Reward = Callable[..., list[float]]


@dataclass(frozen=True)
class Parameters:
    """What some rewards have to be told. None is "not said", which is an error if a reward that needs it is used."""

    max_completion_tokens: int | None = None  # length_penalty: [grpo] has it
    length_cache_tokens: int | None = None  # length_penalty: the last so many tokens cost
    repetition_ngram_tokens: int | None = None  # repetition_penalty: the length of what is repeated
    repetition_max_penalty: float | None = None  # repetition_penalty: what all repetition and nothing else would cost


# --- what a completion is, looked at once for all functions of a suite ---------------------------------------------


class _Judgement(NamedTuple):
    answer: str | None  # what the format reads; None: not well formed
    written: str  # the answer with the white space around it
    canonical: str | None
    integer: bool  # the answer is one bare integer
    exact: bool  # well formed, and the tags as `write` puts them
    tags_in_place: int
    trailing_characters: int


def _judge(format: Format, text: str) -> _Judgement:
    trailing = _count_trailing_characters(format, text)
    parts = format.split(text)
    if parts is None:
        return _Judgement(None, "", None, False, False, _count_tags_in_place(format, text), trailing)
    answer = parts.answer.strip()
    canonical = answers.given(answer)
    bare = answer == canonical or answers.value(answer) is not None
    integer = canonical is not None and bare and "/" not in canonical
    return _Judgement(answer, parts.answer, canonical, integer, format.is_exact(parts), len(format.tags), trailing)


# More completions than this in one batch are judged again by each function: slower, not different.
_CACHED_COMPLETIONS = 4096
_judge_xml = functools.lru_cache(_CACHED_COMPLETIONS)(functools.partial(_judge, XML))
_judge_think = functools.lru_cache(_CACHED_COMPLETIONS)(functools.partial(_judge, THINK))


def _count_tags_in_place(format: Format, text: str) -> int:
    """Count the tags that occur once, after all tags that come before them, and next to a block that is not blank."""
    tags = format.tags
    in_place = 0
    for number, tag in enumerate(tags):
        if text.count(tag) != 1:
            continue
        start = text.index(tag)
        end = start + len(tag)
        if any(earlier in text[end:] for earlier in tags[:number]):
            continue
        if tag in (format.reasoning_open, format.answer_open):
            closing = text.find(tags[number + 1], end)
            block = text[end:] if closing < 0 else text[end:closing]
        else:
            opening = text.rfind(tags[number - 1], 0, start) if number else -1
            block = text[:start] if opening < 0 else text[opening + len(tags[number - 1]) : start]
        in_place += not (block == "" or block.isspace())
    return in_place


def _count_trailing_characters(format: Format, text: str) -> int:
    """Count what follows the answer, one line break apart; an answer that never closes counts as what follows."""
    for tag in (format.answer_close, format.answer_open):
        position = text.rfind(tag)
        if position >= 0:
            end = position + len(tag)
            return len(text) - end - text.startswith("\n", end)
    return 0


def _texts(completions: Sequence[Completion]) -> list[str]:
    return [c if isinstance(c, str) else c[-1]["content"] or "" for c in completions]


# --- suite xml ------------------------------------------------------------------------------------------------------


def xmlcount(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Pay 0.125 for each of the four tags that is in its place, less 0.001 for each character after the answer."""
    return [0.125 * j.tags_in_place - 0.001 * j.trailing_characters for j in map(_judge_xml, _texts(completions))]


def soft_format(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Pay 0.5 for a well-formed completion, however its lines are broken."""
    return [0.0 if j.answer is None else 0.5 for j in map(_judge_xml, _texts(completions))]


def strict_format(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Pay 0.5 for a well-formed completion with each tag on a line of its own."""
    return [0.5 if j.exact else 0.0 for j in map(_judge_xml, _texts(completions))]


def integer(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Pay 0.5 for an answer that is one integer and nothing else, right or wrong. Recipes and logs call it `int`."""
    return [0.5 if j.integer else 0.0 for j in map(_judge_xml, _texts(completions))]


integer.__name__ = "int"


def correctness(completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> list[float]:
    """Pay 2.0 for the right answer of a well-formed completion, in whatever form its number is written."""
    judgements = map(_judge_xml, _texts(completions))
    return [2.0 if _is_right(j, true) else 0.0 for j, true in zip(judgements, answer, strict=True)]


# --- suite think ----------------------------------------------------------------------------------------------------


def match_format_exactly(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Pay 3.0 for a well-formed completion."""
    return [0.0 if j.answer is None else 3.0 for j in map(_judge_think, _texts(completions))]


def match_format_approximately(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Pay 0.5 for each of the three tags that is in its place, -1.0 for each that is not and for a second `<think>`."""
    rewards = []
    for text in _texts(completions):
        in_place = _judge_think(text).tags_in_place
        rewards.append(1.5 * in_place - len(THINK.tags) - (THINK.reasoning_open in text))
    return rewards


def check_answer(completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> list[float]:
    """Pay by how near the answer is.

    5.0 the canonical answer to the letter; 3.5 the same after stripping white space, commas, units and words; 2.0
    within 10% and 1.5 within 20% of it; -2.5 another number; -4.5 not one number; -2.0 not well formed.
    """
    rewards = []
    for text, true in zip(_texts(completions), answer, strict=True):
        judgement = _judge_think(text)
        if judgement.answer is None:
            rewards.append(-2.0)
        elif judgement.written == true:
            rewards.append(5.0)
        elif _is_right(judgement, true):
            rewards.append(3.5)
        elif judgement.canonical is None:
            rewards.append(-4.5)
        else:
            rewards.append(_nearness(judgement.canonical, answers.canonical(true)))
    return rewards


def check_numbers(completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> list[float]:
    """Pay 3.5 for the right number, -1.5 for a wrong one, -2.5 for none or several, 0.0 if the true answer is none."""
    rewards = []
    for text, true in zip(_texts(completions), answer, strict=True):
        number, true_number = _judge_think(text).canonical, answers.canonical(true)
        if true_number is None:
            rewards.append(0.0)
        elif number is None:
            rewards.append(-2.5)
        else:
            rewards.append(3.5 if number == true_number else -1.5)
    return rewards


def _is_right(judgement: _Judgement, true: str) -> bool:
    if judgement.answer is None:
        return False
    if judgement.canonical is None:
        return judgement.answer == true.strip()
    return judgement.canonical == answers.canonical(true)


def _nearness(number: str, true: str | None) -> float:
    """Give the part payment for a wrong number. Exact: nothing is divided, so a true answer of 0 has no near miss."""
    if true is None:
        return -2.5
    above, below = _ratio(number)
    true_above, true_below = _ratio(true)
    miss, size = abs(above * true_below - true_above * below), abs(true_above * below)
    if miss * 10 <= size:
        return 2.0
    if miss * 5 <= size:
        return 1.5
    return -2.5


@functools.lru_cache(_CACHED_COMPLETIONS)
def _ratio(canonical: str) -> tuple[int, int]:
    return Fraction(canonical).as_integer_ratio()


# --- for any format -------------------------------------------------------------------------------------------------


def length_penalty(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_completion_tokens: int,
    length_cache_tokens: int,
    **columns: Any,
) -> list[float]:
    """Pay 0 up to `max_completion_tokens - length_cache_tokens` tokens, from there down to -1.0 at the maximum.

    The soft overlong punishment of DAPO (arXiv 2503.14476, equation 13).
    """
    free_tokens = max_completion_tokens - length_cache_tokens
    return [max(min(free_tokens - len(ids), 0) / length_cache_tokens, -1.0) for ids in completion_ids]


def repetition_penalty(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    repetition_ngram_tokens: int,
    repetition_max_penalty: float,
    **columns: Any,
) -> list[float]:
    """Pay minus `repetition_max_penalty` times the share of a completion's token n-grams that it had before.

    The repetition penalty of arXiv 2502.03373, appendix C.2. A completion shorter than one n-gram costs nothing.
    """
    rewards = []
    for ids in completion_ids:
        ngrams = len(ids) - repetition_ngram_tokens + 1
        shifted = (ids[start : start + ngrams] for start in range(repetition_ngram_tokens))
        new = len(set(zip(*shifted, strict=True))) / ngrams if ngrams > 0 else 1.0
        rewards.append(repetition_max_penalty * (new - 1.0))
    return rewards


MATH_TIMEOUT_SECONDS = 0.5
_MATH_MAX_CHARACTERS = 500
_MATH_MAX_MEMORY_BYTES = 4 << 30  # of address space, of which SymPy alone takes a good part
_ANOTHER_MATH_BLOCK = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin\{(?:equation|align|math)")
_NAMES_ITS_VALUE = re.compile(r"[A-Za-z](?:_[0-9A-Za-z]|\([a-z]\))?\s*=[^=]*")


def math_correct(
    completions: Sequence[Completion], answer: Sequence[str], *, format: Format, **columns: Any
) -> list[float]:
    """Pay 1.0 for an answer mathematically equal to the true one (math-verify: LaTeX, fractions, sets), else 0.0.

    Where the true answer is a number, so must the answer be: `17 + 25` is not an answer to 17 + 25. Each answer has
    `MATH_TIMEOUT_SECONDS` in a process of its own; one that takes longer, or takes that process down, is wrong.
    """
    rewards = []
    for text, true in zip(_texts(completions), answer, strict=True):
        parts = format.read(text)
        rewards.append(1.0 if parts is not None and _is_math_equal(parts.answer, true.strip()) else 0.0)
    return rewards


def _is_math_equal(answer: str, true: str) -> bool:
    number, true_number = answers.given(answer), answers.canonical(true)
    if answer == true or number is not None and number == true_number:
        return True
    if len(answer) > _MATH_MAX_CHARACTERS:
        return False
    # A division left to do; and words that change a number, which math-verify passes over.
    if true_number is not None and (number != answers.canonical(answer) or "\\text" in answer):
        return False
    answer, true = _without_math_marks(answer), _without_math_marks(true)
    # Two blocks are two answers, of which math-verify would take the one that fits; and it takes the right-hand side
    # of an equation for its value, so that 43 = 42 would be worth 42.
    if _ANOTHER_MATH_BLOCK.search(answer):
        return False
    if "=" in answer and "=" not in true and not _NAMES_ITS_VALUE.fullmatch(answer):
        return False
    return _MATH_WORKER.ask(true, answer, true_number is not None)


def _without_math_marks(text: str) -> str:
    for start, end in (("\\boxed{", "}"), ("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$")):
        if text.startswith(start) and text.endswith(end) and len(text) > len(start) + len(end):
            text = text[len(start) : -len(end)].strip()
    return text


class _MathWorker:
    """One process that compares, forked anew from a server that has math-verify loaded whenever it was killed.

    math-verify's own time limit works in the main thread only and not inside one long step of SymPy or of integer
    arithmetic (10 to the power of 10 to the power of 10), so the limit is the worker's death by SIGALRM.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pipe = None

    def start(self) -> None:
        """Start the process, which takes a second the first time, unless it runs."""
        if self._pipe is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["math_verify", __name__])
            self._pipe, remote = context.Pipe()
            process = context.Process(target=_serve_math, args=(remote,), name="math_correct", daemon=True)
            process.start()
            remote.close()  # so that the worker's death ends the pipe
            try:
                self._pipe.recv()  # ready
            except EOFError as error:
                self._pipe = None
                raise UserError("[rewards] math_correct could not start its worker; its error is above") from error

    def ask(self, true: str, answer: str, number: bool) -> bool:
        """Say whether `answer` equals `true` and, if `number` asks for that, is one number."""
        with self._lock:
            self.start()
            # The pipe is kept only if the answer came: a late one must not be taken for that of the next question.
            pipe, self._pipe = self._pipe, None
            try:
                pipe.send((true, answer, number))
                equal = pipe.recv()
            except (EOFError, ConnectionError):
                self.start()
                return False
            self._pipe = pipe
            return equal


_MATH_WORKER = _MathWorker()


def _serve_math(pipe: Any) -> None:
    """Compare what comes through the pipe until it closes; the worker's main function."""
    import logging
    import resource

    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its own time limit is off
    resource.setrlimit(resource.RLIMIT_AS, (_MATH_MAX_MEMORY_BYTES, _MATH_MAX_MEMORY_BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, whose end closes the pipe
    # LaTeX only: plain expressions math-verify gives to SymPy's parse_expr, which evaluates them as Python.
    read = functools.partial(
        parse, extraction_config=[LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None
    )
    verify(read("$1$"), read("$\\frac{2}{2}$"), timeout_seconds=None)  # loads the parser
    pipe.send(True)
    while True:
        try:
            true, answer, number = pipe.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, MATH_TIMEOUT_SECONDS)
        given = read(f"${answer}$")
        equal = len(given) > 0 and (not number or getattr(given[0], "is_Number", False))  # a matrix has no such thing
        equal = equal and verify(read(f"${true}$"), given, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send(equal)


# --- by name --------------------------------------------------------------------------------------------------------

SUITES: dict[str, dict[str, Reward]] = {
    "xml": {f.__name__: f for f in (xmlcount, soft_format, strict_format, integer, correctness)},
    "think": {f.__name__: f for f in (match_format_exactly, match_format_approximately, check_answer, check_numbers)},
}
FOR_ANY_FORMAT: dict[str, Reward] = {f.__name__: f for f in (math_correct, length_penalty, repetition_penalty)}


def load(names: Sequence[str], format: Format, recipe_folder: Path, **parameters: int | float | None) -> list[Reward]:
    """Give the reward functions that a recipe names, in order, each with the `__name__` that logs show it by.

    `names` are those of the suite of `format`, those for any format, and `FILE.py:FUNCTION` for the user's own, the
    file relative to `recipe_folder`. `parameters` are fields of `Parameters`. Raises UserError for what is unknown,
    missing, named twice or not to be called as a reward.
    """
    told = Parameters(**parameters)
    rewards = [_load_one(name, format, recipe_folder, told) for name in names]
    _refuse_twice(names)
    return rewards


def check_names(names: Sequence[str], format: Format, recipe_folder: Path, **parameters: int | float | None) -> None:
    """Raise UserError for what `load` would refuse, as far as shows without running a line of the user's."""
    told = Parameters(**parameters)
    for name in names:
        if _is_own(name):
            _look_for_own(name, _own_path(name, recipe_folder))
        else:
            _known(name, format)
            _parameters_of(name, told)
    _refuse_twice(names)


def _refuse_twice(names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        logged_as = name.rpartition(":")[2]
        if logged_as in seen:
            raise UserError(f"[rewards] {name!r}: another reward is already logged as {logged_as!r}; rename one")
        seen.add(logged_as)


def own_files(names: Sequence[str], recipe_folder: Path) -> dict[str, Path]:
    """Give the user's own files among the rewards `names`, by name: who pays by them is out of date when they change.

    Leaves out those that are not there, which `load` refuses.
    """
    paths = {name: (recipe_folder / name.rpartition(":")[0]).resolve() for name in names if ":" in name}
    return {name: path for name, path in paths.items() if path.is_file()}


def _load_one(name: str, format: Format, recipe_folder: Path, parameters: Parameters) -> Reward:
    if _is_own(name):
        return _load_own(name, recipe_folder)
    reward = _known(name, format)
    if name == "math_correct":
        _MATH_WORKER.start()
        return _named(name, functools.partial(math_correct, format=format))
    own = _parameters_of(name, parameters)
    return _named(name, functools.partial(reward, **own)) if own else reward


def _is_own(name: str) -> bool:
    return ":" in name or name.endswith(".py")


def _known(name: str, format: Format) -> Reward:
    known = SUITES[format.name] | FOR_ANY_FORMAT
    if name not in known:
        raise UserError(f"[rewards] {name!r} {_why_unknown(name, known, format)}")
    return known[name]


def _parameters_of(name: str, parameters: Parameters) -> dict[str, Any]:
    if name == "length_penalty":
        limit = _told(name, parameters, "max_completion_tokens", 1)
        cache = _told(name, parameters, "length_cache_tokens", 1)
        if cache > limit:
            raise UserError(f"[rewards] length_cache_tokens = {cache} is more than max_completion_tokens = {limit}")
        return {"max_completion_tokens": limit, "length_cache_tokens": cache}
    if name == "repetition_penalty":
        ngram = _told(name, parameters, "repetition_ngram_tokens", 1)
        penalty = _told(name, parameters, "repetition_max_penalty", 0)
        return {"repetition_ngram_tokens": ngram, "repetition_max_penalty": penalty}
    return {}


def _why_unknown(name: str, known: dict[str, Reward], format: Format) -> str:
    if name in SUITES:
        return f"is a suite; name its functions, with a weight each: {', '.join(SUITES[name])}"
    for suite, functions in SUITES.items():
        if name in functions:
            return f"is of suite {suite!r}, but [format] name = {format.name!r}; its own: {', '.join(known)}"
    return f"is not known{nearest(name, known)}; known: {', '.join(known)}, or your own as 'FILE.py:FUNCTION'"


def _told(name: str, parameters: Parameters, key: str, least: int) -> Any:
    told = getattr(parameters, key)
    if told is None:
        raise UserError(f"[rewards] {key} is missing: {name} needs it")
    if not told >= least:
        raise UserError(f"[rewards] {key} = {told!r}; expected {least} or more")
    return told


def _named(name: str, function: functools.partial) -> Reward:
    """Give `function` as a plain one with a name: a partial has none, and loggers other than TRL's ask for it."""

    def reward(completions: Sequence[Completion], **columns: Any) -> list[float]:
        return function(completions, **columns)

    reward.__name__ = reward.__qualname__ = name
    reward.__doc__ = function.func.__doc__
    return reward


# --- the user's own -------------------------------------------------------------------------------------------------

MAX_REWARD = 3e38  # TRL adds rewards up in float32, which holds no more


def _own_path(name: str, recipe_folder: Path) -> Path:
    file_name, _, function_name = name.rpartition(":")
    path = (recipe_folder / file_name).resolve()
    if not file_name.endswith(".py") or not function_name.isidentifier():
        raise UserError(f"[rewards] {name!r}: expected 'FILE.py:FUNCTION', the file relative to the recipe")
    if not path.is_file():
        raise UserError(f"[rewards] {name!r}: there is no file {path}")
    return path


def _look_for_own(name: str, path: Path) -> None:
    """Raise UserError if the file is no Python or has no such function, as far as shows without running it."""
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        raise UserError(f"[rewards] {name!r}: {_where(error, path)}") from error
    except ValueError as error:  # a NUL byte
        raise UserError(f"[rewards] {name!r}: {path}: {error}") from error
    function_name = name.rpartition(":")[2]
    bound = list(_names_bound(tree.body))
    if function_name not in bound and "*" not in bound:  # "*": what it imports shows only when it runs
        own = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
        raise UserError(_no_function(name, path, own))
    for node in tree.body:
        plain = isinstance(node, ast.FunctionDef) and not node.decorator_list
        if plain and node.name == function_name and bound.count(function_name) == 1:
            taken = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
            if node.args.posonlyargs or not ("completions" in taken or node.args.kwarg):
                raise UserError(_not_called_so(name, f"({ast.unparse(node.args)})"))


def _names_bound(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Give the names that the statements of a module bind, those within `if` and the like included."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
            continue  # what is within has its own names
        if isinstance(node, ast.alias):
            yield node.asname or node.name.partition(".")[0]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        yield from _names_bound(ast.iter_child_nodes(node))


def _no_function(name: str, path: Path, own: Sequence[str]) -> str:
    function_name = name.rpartition(":")[2]
    return (
        f"[rewards] {name!r}: {path} has no function {function_name!r}{nearest(function_name, own)}; "
        f"it has: {', '.join(own) or 'none'}"
    )


def _not_called_so(name: str, signature: str) -> str:
    function_name = name.rpartition(":")[2]
    return (
        f"[rewards] {name!r}: expected {function_name}(completions, **kwargs), which is called with names only; "
        f"found {function_name}{signature}"
    )


def _load_own(name: str, recipe_folder: Path) -> Reward:
    path = _own_path(name, recipe_folder)
    function_name = name.rpartition(":")[2]
    module = _import_file(name, path)
    function = getattr(module, function_name, None)
    if not inspect.isfunction(function):
        own = [key for key, thing in vars(module).items() if inspect.isfunction(thing) and not key.startswith("_")]
        raise UserError(_no_function(name, path, own))
    return _checked(name, function_name, function)


def _import_file(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"rewards_from_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up by its name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises, they need to know where
        raise UserError(f"[rewards] {name!r}: {_where(error, path)}") from error
    return module


def _checked(name: str, function_name: str, function: Callable[..., Any]) -> Reward:
    """Give the user's function wrapped so that whatever it does wrong is an error that names it, and so does the log.

    It gets the arguments it asks for by name, or all of them if it takes `**kwargs`; lists as copies, since the other
    rewards and the trainer go on with them.
    """
    taken = inspect.signature(function).parameters
    kinds = {parameter.kind for parameter in taken.values()}
    takes_all = inspect.Parameter.VAR_KEYWORD in kinds
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise UserError(f"[rewards] {name!r}: expected a plain function, found an async or a generator function")
    if inspect.Parameter.POSITIONAL_ONLY in kinds or not ("completions" in taken or takes_all):
        raise UserError(_not_called_so(name, str(inspect.signature(function))))
    path = Path(function.__code__.co_filename)
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [key for key, p in taken.items() if p.default is p.empty and p.kind not in variadic]

    @functools.wraps(function)
    def reward(completions: Sequence[Completion], **columns: Any) -> list[float]:
        given = {"completions": completions, **columns}
        missing = [key for key in needed if key not in given]
        if missing:
            raise UserError(
                f"[rewards] {name!r} asks for {', '.join(missing)}, which is no column; there are: {', '.join(given)}"
            )
        passed = given if takes_all else {key: given[key] for key in taken if key in given}
        # Lists alone: what else the trainer passes, such as its state, is not for copying.
        passed = {key: copy.deepcopy(value) if isinstance(value, list) else value for key, value in passed.items()}
        try:
            rewards = function(**passed)
        except (Exception, SystemExit) as error:  # whatever the user's function raises, they need to know where
            raise UserError(f"[rewards] {name!r}: {_where(error, path)}") from error
        return _checked_rewards(name, rewards, len(completions))

    reward.__name__ = function_name
    return reward


def _checked_rewards(name: str, rewards: Any, count: int) -> list[float]:
    if not isinstance(rewards, list | tuple):
        raise UserError(f"[rewards] {name!r} returned {type(rewards).__name__}; expected a list of {count} numbers")
    if len(rewards) != count:
        raise UserError(f"[rewards] {name!r} returned {len(rewards)} rewards for {count} completions")
    paid = []
    for position, reward in enumerate(rewards):
        try:
            paid.append(float(reward) if isinstance(reward, numbers.Real) else math.nan)
        except OverflowError:  # 10**400
            paid.append(math.inf)
        if not abs(paid[-1]) <= MAX_REWARD:  # which NaN is not, either
            raise UserError(
                f"[rewards] {name!r} returned {_shown(reward)} ({type(reward).__name__}) for completion {position}; "
                f"expected a finite number, {MAX_REWARD:.0e} at most in size"
            )
    return paid


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not write out an integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _where(error: BaseException, path: Path) -> str:
    """Say what was raised and, if known, in which line of the user's file."""
    if isinstance(error, SyntaxError):
        return f"{path}, line {error.lineno}: SyntaxError: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f"{path}, line {lines[-1]}" if lines else str(path)
    return f"{where}: {type(error).__name__}: {error}"
