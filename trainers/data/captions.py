"""Captions: reading them from files, and varying them between visits."""

from __future__ import annotations

import csv
import functools
import io
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import DatasetError
from ..formats.json_files import parse_json
from ..rng import stream_seed
from ..text import composed, ends_word, is_text, starts_word
from .pictures import NAMES

if TYPE_CHECKING:
    import numpy as np

    from .examples import Example

# In the order of the search.
SUFFIXES = (".txt", ".caption", ".json")
METADATA = ("metadata.jsonl", "metadata.csv")

# JSON fields in which captioning tools store captions, the best first.
_FIELDS = ("caption", "captions", "text", "prompt", "description", "tags")
FIELDS_IN_WORDS = f"{', '.join(_FIELDS[:-1])} or {_FIELDS[-1]}"
_LIMIT = 16 * 1024 * 1024
# In characters: some hundred times what a text encoder takes at once. The cost of encoding grows with it.
_LONGEST = 10_000

# Most caption variants to encode for a dataset; then the fewest and most for one picture.
_BUDGET = 2048
_FEWEST = 4
_MOST = 64


@functools.lru_cache(maxsize=NAMES)
def is_caption_file(name: str) -> bool:
    """Return True if a file's name marks it as a caption file."""
    return posixpath.splitext(name)[1].lower() in SUFFIXES or posixpath.basename(name).lower() in METADATA


def parse_sidecar(text: str, name: str, lines_are_variants: bool) -> tuple[str, ...]:
    """Return the captions in the text of a file beside a picture; none if it holds none.

    Args:
        name: of the file, which ends in one of SUFFIXES.
        lines_are_variants: whether each line of a text is a separate caption.

    Raises:
        DatasetError: the text is not JSON, though the name says so.
    """
    if not name.lower().endswith(".json"):
        return variants_of(text, lines_are_variants)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise _unreadable(name, f"it is not JSON: {error}", "Correct it, or remove it.") from error
    return from_json(value, lines_are_variants)


def metadata_rows(path: str, name: str) -> Iterator[tuple[str, dict]]:
    """Yield (file_name, row) for each row of a Hugging Face metadata file, with its field names in lower case.

    Source: Hugging Face datasets, "Create an image dataset" (imagefolder).

    Raises:
        DatasetError: a line cannot be read.
    """
    text = read_text(path, name)
    rows = _csv_rows(text, name) if path.lower().endswith(".csv") else _jsonl_rows(text, name)
    for number, row in rows:
        row = _named_alike(row)
        file = row.get("file_name")
        file = file.strip() if isinstance(file, str) else file
        if not isinstance(file, str) or not file:
            raise _unreadable(name, f"line {number} has no file_name", "Correct it, or remove the file.")
        yield file, row


def _named_alike(row: dict) -> dict:
    return {key.strip().lower() if isinstance(key, str) else key: value for key, value in reversed(row.items())}


def _csv_rows(text: str, name: str) -> Iterator[tuple[int, dict]]:
    head = text.split("\n", 1)[0]
    # Where numbers have a decimal comma, spreadsheets separate fields by semicolons.
    between = next((mark for mark in ",;\t" if mark in head), ",")
    reader = csv.DictReader(io.StringIO(text), delimiter=between, skipinitialspace=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise _unreadable(name, f"line {reader.line_num} is not CSV: {error}", "Correct the line.") from error


def _jsonl_rows(text: str, name: str) -> Iterator[tuple[int, dict]]:
    # splitlines() would also split at characters that a caption may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise _unreadable(name, f"line {number} is not JSON: {error}", "Correct the line.") from error
        if not isinstance(row, dict):
            raise _unreadable(name, f"line {number} is not a JSON object", "Correct the line.")
        yield number, row


def from_json(value, lines_are_variants: bool) -> tuple[str, ...]:
    """Return the captions in a JSON value: a string, a list of strings, or an object with one of the known fields."""
    if isinstance(value, str):
        return variants_of(value, lines_are_variants)
    if isinstance(value, list):
        texts = [text for text in value if isinstance(text, str)]
        return tuple(variant for text in texts for variant in variants_of(text, lines_are_variants))
    if isinstance(value, dict):
        value = _named_alike(value)
        for field in _FIELDS:
            content = value.get(field)
            if field == "tags" and isinstance(content, list):
                content = ", ".join(tag for tag in content if isinstance(tag, str))
            captions = from_json(content, lines_are_variants) if isinstance(content, (str, list)) else ()
            if captions:
                return captions
    return ()


def variants_of(text: str, lines_are_variants: bool) -> tuple[str, ...]:
    """Return the captions in a text: all of it in one line, or each of its lines; none if it holds no word.

    Raises:
        DatasetError: the text holds an invalid character, or a caption is too long.
    """
    if not is_text(text):
        raise DatasetError(
            "A caption contains half of a character (a lone surrogate).", "Write it again as UTF-8 text.", "captions"
        )
    if "\0" in text:
        raise DatasetError("A caption contains NUL characters.", "Write it again as UTF-8 text.", "captions")
    parts = text.splitlines() if lines_are_variants else [text]
    variants = tuple(joined for joined in (" ".join(part.split()) for part in parts) if joined)
    longest = max(map(len, variants), default=0)
    if longest > _LONGEST:
        raise DatasetError(f"A caption has {longest} characters.", f"Shorten it to at most {_LONGEST}.", "captions")
    return variants


def read_text(path: str, name: str) -> str:
    try:
        with open(path, "rb") as file:
            # Check the size first: a read with a limit would allocate the whole limit for every short caption.
            size = os.fstat(file.fileno()).st_size
            data = file.read() if size <= _LIMIT else b""
    except OSError as error:
        raise _unreadable(name, str(error), "Check its permissions, or remove it.") from error
    if size > _LIMIT:
        raise _unreadable(name, f"it is larger than {_LIMIT} bytes", "Remove it.")
    try:
        text = data.decode(_encoding_of(data))
    except UnicodeDecodeError as error:
        raise _unreadable(name, f"it is not UTF-8 text: {error}", "Save it with the encoding UTF-8.") from error
    if "\0" in text:
        raise _unreadable(name, "it contains NUL characters, so it is not text", "Save it with the encoding UTF-8.")
    return text


def _encoding_of(data: bytes) -> str:
    """Detect a text's encoding by its byte order mark, or by the positions of zero bytes, which UTF-8 text lacks."""
    # Test UTF-32 first: its mark begins with that of UTF-16.
    if data.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
        return "utf-32"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    pairs = len(data) // 2
    even, odd = data[::2].count(0), data[1::2].count(0)
    if len(data) % 4 == 0 and pairs:
        # No character is beyond 0x10ffff, so the high byte is 0 and the next one at most 0x10.
        for encoding, high, next_high, low in (("utf-32-le", 3, 2, 0), ("utf-32-be", 0, 1, 3)):
            if not any(data[high::4]) and max(data[next_high::4]) <= 0x10 and any(data[low::4]):
                return encoding
    if len(data) % 2 == 0 and pairs:
        # In UTF-16 most letters have a zero byte, and nearly all of these bytes are on the same side.
        for encoding, zeros, others in (("utf-16-le", odd, even), ("utf-16-be", even, odd)):
            if 2 * zeros >= pairs and 10 * others <= zeros:
                return encoding
    return "utf-8-sig"


def _unreadable(name: str, why: str, cure: str) -> DatasetError:
    return DatasetError(f"The caption file '{name}' cannot be read ({why}).", cure, "folder")


def with_trigger(caption: str, trigger: str) -> str:
    """Put the trigger in front unless the caption holds it; replace `[trigger]` by it."""
    if "[trigger]" in caption:
        return caption.replace("[trigger]", trigger).strip()
    if not trigger or holds_words(caption, trigger):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def holds_words(caption: str, words: str) -> bool:
    """Return True if a caption holds `words` as whole words, regardless of case and Unicode form."""
    return _whole(words).search(composed(caption)) is not None


def replace_words(caption: str, words: str, others: str) -> str:
    """Return a caption with other words in place of `words`, which are found as by `holds_words`."""
    return _whole(words).sub(lambda _: others, composed(caption))


def _whole(words: str) -> re.Pattern:
    words = composed(words)
    return re.compile(starts_word(words) + re.escape(words) + ends_word(words), re.IGNORECASE)


def unvaried_caption(example: Example) -> str:
    """Return the unvaried caption with its trigger: the first variant and alternatives, nothing moved or dropped."""
    caption = example.captions[0]
    if example.handling.wildcards:
        caption = _resolve(caption, None)
    return with_trigger(caption, example.trigger)


def variant_count(example: Example, pictures: int) -> int:
    """Return the number of versions of a caption that the visits of a picture choose from.

    Args:
        pictures: number in the whole dataset; the fewer there are, the more versions of each are worth encoding.
    """
    handling = example.handling
    lines = len(example.captions)
    if not _varies(example):
        return lines
    return max(lines, handling.caption_variants or max(_FEWEST, min(_MOST, _BUDGET // max(1, pictures))))


def _varies(example: Example) -> bool:
    handling = example.handling
    if handling.wildcards and any("{" in caption for caption in example.captions):
        return True
    return (handling.shuffle_tags or handling.tag_dropout > 0) and any("," in text for text in example.captions)


def make_variant(example: Example, number: int) -> str:
    """Return version `number` of a caption, the same for every run and seed, so that runs share cached encodings.

    Take a line of the caption file, in rotation. Replace each `{a|b}` by one of its parts, drawn at random. Put in the
    trigger. Of the comma-separated parts, the trigger and the first `keep_tokens` keep their places. Drop some of the
    other parts at random, and shuffle the rest.
    """
    import numpy as np

    handling = example.handling
    caption = example.captions[number % len(example.captions)]
    if not handling.wildcards and not handling.shuffle_tags and not handling.tag_dropout:
        return with_trigger(caption, example.trigger)
    seed = stream_seed("caption", example.digest, example.captions, number)
    draw = np.random.RandomState(seed % (2**32))
    if handling.wildcards:
        caption = _resolve(caption, draw)
    full = with_trigger(caption, example.trigger)
    if not handling.shuffle_tags and not handling.tag_dropout:
        return full
    # The user did not write a trigger that was put in front, so it does not count among the kept parts.
    added = full != caption and "[trigger]" not in caption
    return _move_tags(example, caption if added else full, added, draw)


def _move_tags(example: Example, caption: str, added: bool, draw: np.random.RandomState) -> str:
    handling = example.handling
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    kept = tags[: handling.keep_tokens]
    rest = []
    for tag in tags[handling.keep_tokens :]:
        # Draw for each tag, so that dropping one does not depend on the others.
        dropped = draw.random_sample() < handling.tag_dropout
        if not dropped or (example.trigger and holds_words(tag, example.trigger)):
            rest.append(tag)
    if handling.shuffle_tags:
        draw.shuffle(rest)
    front = [example.trigger] if added else []
    return ", ".join(front + kept + rest)


_MARKS = re.compile(r"([{}|])")


@dataclass
class _Wildcard:
    """Unclosed `{` of a caption, and the text after it so far.

    Attributes:
        start: index of the `{` among the caption's tokens.
        level: one more than the highest level of the wildcards in it; 0 if it has none.
        parts: the text between its `|`, each part a list of pieces: texts, and lists of pieces of closed inner braces.
        plain: whether all inner braces are wildcards themselves.
    """

    start: int
    level: int = 0
    parts: list[list] = field(default_factory=lambda: [[]])
    plain: bool = True


def _resolve(caption: str, draw: np.random.RandomState | None) -> str:
    """Replace each `{a|b}` by one of its parts, inner ones first; take the first part if `draw` is None."""
    tokens = _MARKS.split(caption)
    sizes = {}
    _join_wildcards(
        tokens, lambda wildcard: sizes.setdefault((wildcard.level, wildcard.start), len(wildcard.parts)) and 0
    )
    # The order of the draws decides the caption: innermost first, from left to right, then the enclosing ones.
    chosen = {start: draw.randint(sizes[level, start]) if draw is not None else 0 for level, start in sorted(sizes)}
    return " ".join(_join_wildcards(tokens, lambda wildcard: chosen[wildcard.start]).split())


def _join_wildcards(tokens: list[str], choose: Callable[[_Wildcard], int]) -> str:
    """Replace each wildcard of a caption by one of its parts; leave other braces as they are.

    Args:
        tokens: the caption, split at `{`, `|` and `}`.
        choose: returns the index of a wildcard's part.
    """
    whole = _Wildcard(-1)
    open_wildcards = [whole]
    for place, token in enumerate(tokens):
        inner = open_wildcards[-1]
        if token == "{":
            open_wildcards.append(_Wildcard(place))
        elif token == "|" and inner is not whole:
            inner.parts.append([])
        elif token == "}" and inner is not whole:
            open_wildcards.pop()
            outer = open_wildcards[-1]
            if inner.plain and len(inner.parts) > 1:
                outer.level = max(outer.level, inner.level + 1)
                outer.parts[-1].append(inner.parts[choose(inner)])
            else:
                outer.plain = False
                outer.parts[-1] += [_as_written(inner), "}"]
        else:
            inner.parts[-1].append(token)
    return "".join(
        _texts([_as_written(unclosed) if unclosed is not whole else whole.parts[0] for unclosed in open_wildcards])
    )


def _as_written(wildcard: _Wildcard) -> list:
    pieces = ["{", wildcard.parts[0]]
    for part in wildcard.parts[1:]:
        pieces += ["|", part]
    return pieces


def _texts(pieces: list) -> Iterator[str]:
    """Yield the texts in nested pieces, without recursion, since they may nest deeper than Python's limit."""
    pending = [iter(pieces)]
    while pending:
        piece = next(pending[-1], None)
        if piece is None:
            pending.pop()
        elif isinstance(piece, str):
            yield piece
        else:
            pending.append(iter(piece))


def variant_of_visit(example: Example, count: int, seed: int, place: int, visit: int) -> int | None:
    """Return the number of the caption version for a visit, or None if the caption is dropped.

    Every version is used once before one is used again.

    Args:
        count: number of versions, from `variant_count`.
        place: identifies the picture's stream of random numbers.
        visit: number of earlier visits.
    """
    import numpy as np

    draw = np.random.RandomState(stream_seed("dropout", seed, place, visit) % (2**32))
    if draw.random_sample() < example.handling.caption_dropout:
        return None
    if count == 1:
        return 0
    cycle = np.random.RandomState(stream_seed("variants", seed, place, visit // count) % (2**32))
    return int(cycle.permutation(count)[visit % count])
