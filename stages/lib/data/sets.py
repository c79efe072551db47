"""The sft, grpo and eval sets: drafts of all rows, then the sets without duplicates, leaks and long rows."""

import hashlib
import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from stages.lib.bounded import process_pool
from stages.lib.data.files import read_batches
from stages.lib.data.rows import BIT, SETS, VALIDATION, Checked, Rules, check_batch, encode, label
from stages.lib.data.ruler import Ruler
from stages.lib.errors import UserError
from stages.lib.recipe.tables import Recipe, Source
from stages.lib.rewards.own import is_own

SLACK_TOKENS = 16  # the markup around a question may have some more tokens than around the one that was measured
# A source with so many bytes is large: several processes share the work, and not all prompts are tokenized.
LARGE_BYTES = 1 << 25
MAX_PROCESSES = 4  # each takes memory, and the last part of the work is done by one
MAX_WAITING = 2 * MAX_PROCESSES  # batches sent to them and not yet returned: bounds the memory
# Of a large source, the first batches (of 1 MB, or 2,000 rows) are tokenized for the length percentiles, and of the
# others only rows that may be too long: a token is at least one byte, so a row of few bytes has few tokens.
MEASURED_BATCHES = 2
MEASURED = {"long prompt": "prompt_tokens", "long example": "example_tokens"}  # the column that a reason goes by


def is_large(files: list[Path]) -> bool:
    """Return whether a source's files, none for one from the hub, are worth several processes."""
    return sum(file.stat().st_size for file in files) >= LARGE_BYTES


def helpers(located: list[list[Path]]) -> AbstractContextManager[ProcessPoolExecutor | None]:
    """Return the processes that share the work on large sources; None without such a source or a second processor."""
    processes = min(os.cpu_count() or 1, MAX_PROCESSES)
    if processes == 1 or not any(is_large(files) for files in located):
        return nullcontext()
    pool = process_pool(processes, "stages.lib.data.fingerprint")
    for _ in range(processes):
        pool.submit(os.getpid)  # each starts when there is work for it
    return pool


def check_all(
    source: Source, files: list[Path], rules: Rules, content: Any, folder: Path, pool: ProcessPoolExecutor | None
) -> Iterator[Checked]:
    """Yield every batch of a source, checked, in order; `pool` shares the work on a large one.

    The hash `content` is updated with the rows from the hub; a file has a digest of its own.
    """
    large = is_large(files)
    futures: deque[Future[Checked]] = deque()
    for number, batch in enumerate(read_batches(source, files, rules.whole_rows and "grpo" in source.use)):
        if not files:
            content.update(repr(batch.columns if batch.rows is None else batch.rows).encode())
        job = (source, batch, rules, not large or number < MEASURED_BATCHES, folder)
        if pool and large:
            futures.append(pool.submit(check_batch, *job))
            if len(futures) == MAX_WAITING:
                yield futures.popleft().result()
        else:
            yield check_batch(*job)
    while futures:
        yield futures.popleft().result()


class Draft:
    """The sets before the rows are compared with each other: files of their lines, and a table of all rows."""

    def __init__(self, folder: Path, ruler: Ruler, recipe: Recipe, instructions: tuple[str, ...] = ()) -> None:
        self.folder, self.ruler, self.recipe = folder, ruler, recipe
        self.removed = (folder / "removed.jsonl").open("w", encoding="utf-8")
        self.origins: list[str] = []  # the files' names in the artifact
        self.parts: dict[str, list[Any]] = {}  # the table's columns, an array a batch
        self.batches: list[tuple[int, dict[str, tuple[Path, int]]]] = []  # rows in the table, and where the drafts are
        self.dropped = {name: Counter[str]() for name in (*SETS, VALIDATION)}
        self.examples: dict[tuple[str, str], str] = {}  # of the rows left out of a source or set by reason, the first
        self.warnings: list[str] = []
        (prompt,), (example,) = ruler.tokens([("0",)]), ruler.tokens([("0", "0")])
        self.rules = Rules(
            recipe.format.name,
            ruler.system_prompt,
            recipe.data.ngram_words,
            recipe.data.max_prompt_tokens - prompt - SLACK_TOKENS,
            recipe.sft.max_tokens - example - SLACK_TOKENS,
            instructions,
            any(is_own(name) for name in recipe.rewards.functions),
        )

    def add_source(self, source: Source, files: list[Path], pool: ProcessPoolExecutor | None) -> dict[str, Any]:
        """Read a source to its end; return its entry in the manifest. Raises `UserError` for a row to refuse."""
        dropped, content, origin = Counter[str](), hashlib.sha256(), ""
        separators: dict[str, str] = {}
        rows = unused = 0
        for checked in check_all(source, files, self.rules, content, self.folder, pool):
            if checked.origin != origin:
                origin = checked.origin
                self.origins.append(label(source, Path(origin)) if files else origin)
            rows += checked.rows
            unused += checked.unused
            dropped.update(row.reason for row in checked.removed if row.set is None)
            separators = checked.separators | separators
            self.add(checked)
        if len(separators) == 2:
            raise UserError(
                f"{separators['two ways']} reads two ways, since elsewhere the decimals follow a comma "
                f'({separators["decimal comma"]}). State decimal = "," for {source.name} in the recipe, or "."'
            )
        if 2 * dropped.total() > rows:
            self.warn_of_most(f"{source.name} ({source.split})", "", dropped, rows)
        entry = {"name": source.name, "split": source.split, "use": source.use, "rows": rows, "dropped": dict(dropped)}
        entry |= {"outside_shares": unused} if source.shares else {}
        return entry if files else {**entry, "revision": source.revision, "sha256": content.hexdigest()}

    def warn_of_most(self, what: str, name: str, dropped: Counter[str], rows: int) -> None:
        """Note that more than half of `rows` are left out, and what is wrong with the first of the commonest reason."""
        (reason, count), *_ = dropped.most_common(1)
        example = self.examples.get((name, reason), "")
        self.warnings.append(
            f"{what}: {dropped.total():,} of {rows:,} rows are left out, {count:,} of them for: {reason}"
            f"{f', such as {example}' if example else ''}. All are in removed.jsonl"
        )

    def add(self, checked: Checked) -> None:
        """Measure the rows of a batch that have to be, and append the batch to the table."""
        import numpy as np

        for each in checked.removed:
            if each.set:
                self.dropped[each.set][each.reason] += 1
            place = f"{self.origins[-1]}:{each.number}"
            self.examples.setdefault((each.set or "", each.reason), f"{place}: {each.found}")
            line = {"id": each.id, "set": each.set, "reason": each.reason, "found": each.found, "where": place}
            self.removed.write(encode(line) + "\n")
        if not checked.table:
            return
        token_counts = self.ruler.tokens([texts for _, _, texts in checked.to_measure])
        for (column, row, _), tokens in zip(checked.to_measure, token_counts, strict=True):
            checked.table[column][row] = tokens
        rows = len(checked.table["ids"])
        origin = np.full(rows, len(self.origins) - 1, np.uint16)
        for name, values in {**checked.table, "origin": origin}.items():
            self.parts.setdefault(name, []).append(values)
        self.batches.append((rows, checked.drafts))

    @contextmanager
    def pieces(self, name: str, *, delete: bool = True) -> Iterator[list[tuple[BinaryIO, int, int]]]:
        """Give (the draft `name`, where the batch begins, its rows) for each batch in order; then delete the drafts."""
        paths = {drafts[name][0] for _, drafts in self.batches}
        with ExitStack() as stack:
            files = {path: stack.enter_context(path.open("rb")) for path in paths}
            yield [(files[drafts[name][0]], drafts[name][1], rows) for rows, drafts in self.batches]
        for path in paths if delete else ():
            path.unlink()

    def finish(self) -> dict[str, Any]:
        """Write the sets without the rows to remove, list those, and return the manifest's part on the sets.

        Raises `UserError` for a set without rows.
        """
        import numpy as np

        from stages.lib.data import duplicates

        if not self.batches:
            said = "".join(f"\n  {reason}: {found}" for (_, reason), found in self.examples.items())
            raise UserError(f"no source has a row that can be used; nothing to train on{said}")
        data, jaccard = self.recipe.data, self.recipe.data.near_duplicate_jaccard
        table = {name: np.concatenate(self.parts.pop(name)) for name in list(self.parts)}
        draft_sets = table["sets"].copy()

        def rows_in(*names: str) -> Any:
            return np.flatnonzero(table["sets"] & sum(BIT[name] for name in names))

        def remove(name: str, reason: str, rows: Any, others: Any = None, likeness: Any = None) -> None:
            table["sets"][rows] &= 255 - BIT[name]
            self.list_removed(table, name, reason, rows, others, likeness)

        with self.removed, self.pieces("grams") as pieces:
            grams = duplicates.Grams(pieces, table["counts"])
            for name in SETS:
                rows = rows_in(name)
                remove(name, "long prompt", rows[table["prompt_tokens"][rows] > data.max_prompt_tokens])
                if name == "sft":
                    rows = rows_in(name)
                    remove(name, "long example", rows[table["example_tokens"][rows] > self.recipe.sft.max_tokens])
                rows = rows_in(name)
                first = duplicates.exact_duplicates(table["ids"][rows])
                again = np.flatnonzero(first < np.arange(len(rows)))
                other = table["answers"][rows[again]] != table["answers"][rows[first[again]]]
                reasons = {"exact duplicate": again[~other], "exact duplicate, other answer": again[other]}
                for reason, these in reasons.items():
                    remove(name, reason, rows[these], rows[first[these]], np.ones(len(these)))
                if jaccard < 1:
                    pairs = duplicates.near_duplicates(rows_in(name), table["bands"], grams, jaccard)
                    remove(name, "near duplicate", *pairs)
            for held_out in ("eval", VALIDATION):
                if held_out == VALIDATION and data.validation_rows:
                    chosen = self.chosen_for_validation(rows_in("grpo"), table["ids"])
                    table["sets"][chosen] |= BIT[VALIDATION]
                    for name in ("sft", "grpo"):
                        remove(name, "kept for validation", chosen[(table["sets"][chosen] & BIT[name]) > 0])
                held_rows, train_rows = rows_in(held_out), rows_in("sft", "grpo")
                if len(held_rows) and len(train_rows):
                    close = duplicates.contaminated(held_rows, train_rows, grams, data.contamination_overlap)
                    for name in ("sft", "grpo"):
                        hit = (table["sets"][close[0]] & BIT[name]) > 0
                        remove(name, f"too close to {held_out}", *(column[hit] for column in close))
        names = (VALIDATION, *SETS) if data.validation_rows else SETS  # it is copied out of the drafts of grpo
        return {name: self.finish_set(name, table, draft_sets) for name in names}

    def chosen_for_validation(self, rows: Any, ids: Any) -> Any:
        """Return which of grpo's `rows` are the validation set: those whose questions have the lowest hashes.

        Raises `UserError` where none would be left to train on.
        """
        import numpy as np

        count = self.recipe.data.validation_rows
        if count >= len(rows):
            raise UserError(
                f"{self.recipe.path}: [data] validation_rows = {count}; expected fewer than the {len(rows)} rows of "
                f"the grpo set, which they are taken from. Lower it, or give [[data.sources]] with more rows"
            )
        return np.sort(rows[np.argsort(ids[rows], kind="stable")[:count]])

    def finish_set(self, name: str, table: dict[str, Any], draft_sets: Any) -> dict[str, Any]:
        """Copy the rows left in a set out of its drafts; return the set's entry in the manifest.

        `draft_sets` has the bits of the sets that have a draft of each row; `table["sets"]`, of those that keep it.
        """
        import numpy as np

        rows = np.flatnonzero(table["sets"] & BIT[name])
        if not len(rows):
            dropped = self.dropped[name]
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "no row came in"
            said = "".join(
                f"\n  {reason}: {self.examples[where, reason]}"
                for where, reason in self.examples
                if where in ("", name)
            )
            raise UserError(f"the {name} set is empty: {reasons}. See [data] in {self.recipe.path}{said}")
        if 2 * self.dropped[name].total() > len(rows) + self.dropped[name].total():
            self.warn_of_most(f"the {name} set", name, self.dropped[name], len(rows) + self.dropped[name].total())
        first = 0
        source = "grpo" if name == VALIDATION else name  # whose drafts have its lines
        size = table[f"{source}_bytes"]
        drafts = self.pieces(source, delete=source == name)
        with drafts as pieces, (self.folder / f"{name}.jsonl").open("wb") as file:
            for draft, begin, count in pieces:
                there = first + np.flatnonzero(draft_sets[first : first + count] & BIT[source])
                stays = (table["sets"][there] & BIT[name]) > 0
                ends = begin + np.append(0, np.cumsum(size[there], dtype=np.int64))
                edges = ends[np.flatnonzero(np.diff(np.concatenate([[False], stays, [False]]).astype(np.int8)))]
                for start, stop in edges.reshape(-1, 2).tolist():  # from the first of a run of rows to its end
                    draft.seek(start)
                    file.write(draft.read(stop - start))
                first += count
        lengths = {"prompt_tokens": percentiles(table["prompt_tokens"][rows])}
        if name == "sft":
            lengths["example_tokens"] = percentiles(table["example_tokens"][rows])
        return {"rows": len(rows), "dropped": dict(sorted(self.dropped[name].items())), **lengths}

    def list_removed(self, table: dict[str, Any], name: str, reason: str, rows: Any, others: Any, like: Any) -> None:
        """Count and list the removed `rows` of a set; `others` are the rows that they are too like, if any."""

        def place(row: int) -> str:
            return f"{self.origins[table['origin'][row]]}:{table['number'][row]}"

        if len(rows):
            self.dropped[name][reason] += len(rows)
        for index, row in enumerate(rows.tolist()):
            row_id = f"{table['ids'][row]:016x}"
            line: dict[str, Any] = {"id": row_id, "set": name, "reason": reason, "where": place(row)}
            found = place(row)
            if reason in MEASURED:
                line["tokens"] = int(table[MEASURED[reason]][row])
                found = f"{found}: {line['tokens']:,} tokens"
            if others is not None:
                other = int(others[index])
                line |= {"like": f"{table['ids'][other]:016x}", "like_where": place(other)}
                line["likeness"] = round(float(like[index]), 4)
                found = f"{found}, like {line['like_where']}"
            self.examples.setdefault((name, reason), found)
            self.removed.write(encode(line) + "\n")


def percentiles(tokens: Any) -> dict[str, int]:
    """Return percentiles of the measured lengths, those above 0, and how many were measured."""
    import numpy as np

    tokens = tokens[tokens > 0]
    values = np.percentile(tokens, (50, 90, 99, 100), method="higher").tolist() if len(tokens) else [0] * 4
    return {"measured": len(tokens), **dict(zip(("p50", "p90", "p99", "max"), map(int, values), strict=True))}
