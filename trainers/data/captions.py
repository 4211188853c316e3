"""Captions: the files they are read from, and how a caption is varied from one showing to the next."""

from __future__ import annotations

import csv
import io
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import DatasetError
from ..formats.files import parse_json
from ..rng import stream_seed
from ..text import composed, ends_word, is_text, starts_word

if TYPE_CHECKING:
    import numpy as np

    from .examples import Example

# In the order they are looked for.
SUFFIXES = (".txt", ".caption", ".json")
METADATA = ("metadata.jsonl", "metadata.csv")

# The names under which captioning tools keep a caption in JSON, the best first.
_FIELDS = ("caption", "captions", "text", "prompt", "description", "tags")
FIELDS_IN_WORDS = f"{', '.join(_FIELDS[:-1])} or {_FIELDS[-1]}"
_LIMIT = 16 * 1024 * 1024
# Characters: some hundred times what a text encoder takes at once, and each time it is encoded costs as much.
_LONGEST = 10_000

# How many captions a varying dataset is worth encoding in all, and the bounds for one picture.
_BUDGET = 2048
_FEWEST = 4
_MOST = 64


def is_caption_file(name: str) -> bool:
    """Whether a file's name says that it holds captions."""
    return posixpath.splitext(name)[1].lower() in SUFFIXES or posixpath.basename(name).lower() in METADATA


def read_sidecar(path: str, name: str, lines_are_variants: bool) -> tuple[str, ...]:
    """The captions in a file beside a picture; empty when it holds none.

    Args:
        path: ending in one of SUFFIXES.
        name: for the error.
        lines_are_variants: whether each line of a text is a caption of its own.

    Raises:
        DatasetError: naming the file, when it cannot be read as text or JSON.
    """
    text = _read_text(path, name)
    if not path.lower().endswith(".json"):
        return variants_of(text, lines_are_variants)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise _unreadable(name, f"it is no JSON: {error}", "Correct it, or remove it.") from error
    return _from_json(value, lines_are_variants)


def read_metadata(path: str, name: str, lines_are_variants: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(file_name, captions) of each row of a Hugging Face metadata file; rows without a caption have none.

    Source: Hugging Face datasets, "Create an image dataset" (imagefolder).

    Raises:
        DatasetError: naming the file and the line.
    """
    text = _read_text(path, name)
    rows = _csv_rows(text, name) if path.lower().endswith(".csv") else _jsonl_rows(text, name)
    for number, row in rows:
        row = _named_alike(row)
        file = row.get("file_name")
        file = file.strip() if isinstance(file, str) else file
        if not isinstance(file, str) or not file:
            raise _unreadable(name, f"line {number} names no file_name", "Correct it, or remove the file.")
        yield file, _from_json(row, lines_are_variants)


def _named_alike(row: dict) -> dict:
    """A row whose fields' names have neither spaces around them nor capitals."""
    return {key.strip().lower() if isinstance(key, str) else key: value for key, value in reversed(row.items())}


def _csv_rows(text: str, name: str) -> Iterator[tuple[int, dict]]:
    head = text.split("\n", 1)[0]
    # Spreadsheets write semicolons where a comma stands in numbers.
    between = next((mark for mark in ",;\t" if mark in head), ",")
    reader = csv.DictReader(io.StringIO(text), delimiter=between, skipinitialspace=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise _unreadable(name, f"line {reader.line_num} is no CSV: {error}", "Correct it.") from error


def _jsonl_rows(text: str, name: str) -> Iterator[tuple[int, dict]]:
    # Not by splitlines: a caption may hold characters that it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise _unreadable(name, f"line {number} is no JSON: {error}", "Correct it.") from error
        if not isinstance(row, dict):
            raise _unreadable(name, f"line {number} is no JSON object", "Correct it.")
        yield number, row


def _from_json(value, lines_are_variants: bool) -> tuple[str, ...]:
    """Captions in a JSON value: a text, a list of texts, or an object with one of the known fields."""
    if isinstance(value, str):
        return variants_of(value, lines_are_variants)
    if isinstance(value, list):
        texts = [text for text in value if isinstance(text, str)]
        return tuple(found for text in texts for found in variants_of(text, lines_are_variants))
    if isinstance(value, dict):
        value = _named_alike(value)
        for field in _FIELDS:
            found = value.get(field)
            if field == "tags" and isinstance(found, list):
                found = ", ".join(tag for tag in found if isinstance(tag, str))
            captions = _from_json(found, lines_are_variants) if isinstance(found, (str, list)) else ()
            if captions:
                return captions
    return ()


def variants_of(text: str, lines_are_variants: bool) -> tuple[str, ...]:
    """The captions in a text: the whole of it in one line, or each of its lines; none when it holds no word.

    Raises:
        DatasetError: something in it is no character, or a caption is too long.
    """
    if not is_text(text):
        raise DatasetError("A caption holds half a character.", "Write it anew, as UTF-8 text.", "captions")
    if "\0" in text:
        raise DatasetError("A caption holds NUL characters.", "Write it anew, as UTF-8 text.", "captions")
    parts = text.splitlines() if lines_are_variants else [text]
    found = tuple(joined for joined in (" ".join(part.split()) for part in parts) if joined)
    longest = max(map(len, found), default=0)
    if longest > _LONGEST:
        raise DatasetError(
            f"A caption has {longest} characters.", f"At most {_LONGEST} are taken: shorten it.", "captions"
        )
    return found


def _read_text(path: str, name: str) -> str:
    try:
        with open(path, "rb") as file:
            # Asked first: a read with a limit would reserve the whole of it for every short caption.
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
        raise _unreadable(name, "it holds NUL characters, which no text has", "Save it with the encoding UTF-8.")
    return text


def _encoding_of(data: bytes) -> str:
    """The encoding of a text, by its mark, or by where its zeros are, which UTF-8 has nowhere."""
    # The mark of UTF-32 begins as that of UTF-16 does.
    if data.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
        return "utf-32"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    pairs = len(data) // 2
    even, odd = data[::2].count(0), data[1::2].count(0)
    if len(data) % 4 == 0 and pairs:
        # No character is beyond 0x10ffff: a high byte of 0, and the next of at most 0x10.
        for encoding, high, next_high, low in (("utf-32-le", 3, 2, 0), ("utf-32-be", 0, 1, 3)):
            if not any(data[high::4]) and max(data[next_high::4]) <= 0x10 and any(data[low::4]):
                return encoding
    if len(data) % 2 == 0 and pairs:
        # Taken for UTF-16 where most letters have a zero, and it stands on the same side of nearly all of them.
        for encoding, zeros, others in (("utf-16-le", odd, even), ("utf-16-be", even, odd)):
            if 2 * zeros >= pairs and 10 * others <= zeros:
                return encoding
    return "utf-8-sig"


def _unreadable(name: str, why: str, cure: str) -> DatasetError:
    return DatasetError(f"The caption file '{name}' cannot be read ({why}).", cure, "folder")


def with_trigger(caption: str, trigger: str) -> str:
    """Puts the trigger in front unless the caption holds it; `[trigger]` is replaced by it."""
    if "[trigger]" in caption:
        return caption.replace("[trigger]", trigger).strip()
    if not trigger or holds_words(caption, trigger):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def holds_words(caption: str, words: str) -> bool:
    """Whether a caption holds some words as whole words, whatever their case and Unicode form."""
    words = composed(words)
    pattern = starts_word(words) + re.escape(words) + ends_word(words)
    return re.search(pattern, composed(caption), re.IGNORECASE) is not None


def plain(example: Example) -> str:
    """The caption as it stands, with its trigger: the first variant and alternatives, nothing moved or dropped."""
    caption = example.captions[0]
    if example.handling.wildcards:
        caption = _resolve(caption, None)
    return with_trigger(caption, example.trigger)


def variant_count(example: Example, pictures: int) -> int:
    """Among how many versions of its caption a picture's showings choose.

    Args:
        pictures: in the whole dataset; the fewer there are, the more versions of each are worth encoding.
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


def variant(example: Example, number: int) -> str:
    """Version `number` of a caption: the same for every run and seed, so that runs share what is encoded.

    A line of the caption's file is chosen in turn, then one of each `{a|b}`, then the trigger is put in; of the
    comma-separated parts the trigger and the first `keep_tokens` stay where they are, and each other one may be
    dropped, the rest shuffled.
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
    # A trigger put in front is no part of what the user wrote, so it does not count among the kept.
    added = full != caption and "[trigger]" not in caption
    return _move_tags(example, caption if added else full, added, draw)


def _move_tags(example: Example, caption: str, added: bool, draw: np.random.RandomState) -> str:
    handling = example.handling
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    kept = tags[: handling.keep_tokens]
    rest = []
    for tag in tags[handling.keep_tokens :]:
        # Drawn for each, so that whether one stays does not hang on the others.
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
    """An open `{` of a caption, and what stands behind it so far.

    Attributes:
        start: its place among the caption's tokens.
        level: one more than that of the wildcards in it.
        parts: what stands between its `|`, each in pieces: texts, and lists of pieces of what was closed in it.
        plain: whether all braces in it are wildcards themselves.
    """

    start: int
    level: int = 0
    parts: list[list] = field(default_factory=lambda: [[]])
    plain: bool = True


def _resolve(caption: str, draw: np.random.RandomState | None) -> str:
    """Replace each `{a|b}` by one of its parts, inner ones first; by the first one when nothing is drawn."""
    tokens = _MARKS.split(caption)
    sizes = {}
    _join_wildcards(tokens, lambda one: sizes.setdefault((one.level, one.start), len(one.parts)) and 0)
    # The order of the draws decides the caption: innermost first, from left to right, then those around them.
    chosen = {start: draw.randint(sizes[level, start]) if draw is not None else 0 for level, start in sorted(sizes)}
    return " ".join(_join_wildcards(tokens, lambda one: chosen[one.start]).split())


def _join_wildcards(tokens: list[str], choose: Callable[[_Wildcard], int]) -> str:
    """A caption with each wildcard replaced by one of its parts; braces that are none stay.

    Args:
        tokens: the caption, cut at `{`, `|` and `}`.
        choose: gives the place of a wildcard's part.
    """
    whole = _Wildcard(-1)
    open_ones = [whole]
    for place, token in enumerate(tokens):
        inner = open_ones[-1]
        if token == "{":
            open_ones.append(_Wildcard(place))
        elif token == "|" and inner is not whole:
            inner.parts.append([])
        elif token == "}" and inner is not whole:
            open_ones.pop()
            outer = open_ones[-1]
            if inner.plain and len(inner.parts) > 1:
                outer.level = max(outer.level, inner.level + 1)
                outer.parts[-1].append(inner.parts[choose(inner)])
            else:
                outer.plain = False
                outer.parts[-1] += [_as_written(inner), "}"]
        else:
            inner.parts[-1].append(token)
    return "".join(
        _texts([_as_written(unclosed) if unclosed is not whole else whole.parts[0] for unclosed in open_ones])
    )


def _as_written(given: _Wildcard) -> list:
    pieces = ["{", given.parts[0]]
    for part in given.parts[1:]:
        pieces += ["|", part]
    return pieces


def _texts(pieces: list) -> Iterator[str]:
    """The texts in pieces, which may lie deeper than functions can call themselves."""
    pending = [iter(pieces)]
    while pending:
        piece = next(pending[-1], None)
        if piece is None:
            pending.pop()
        elif isinstance(piece, str):
            yield piece
        else:
            pending.append(iter(piece))


def variant_of_turn(example: Example, count: int, seed: int, place: int, turn: int) -> int | None:
    """Which version of its caption a showing has; None where the caption is dropped.

    Every version is shown once before one is shown again.

    Args:
        count: of versions, as `variant_count` gives it.
        seed: of the run.
        place: of the picture in the dataset.
        turn: how often it was shown before.
    """
    import numpy as np

    draw = np.random.RandomState(stream_seed("dropout", seed, place, turn) % (2**32))
    if draw.random_sample() < example.handling.caption_dropout:
        return None
    if count == 1:
        return 0
    cycle = np.random.RandomState(stream_seed("variants", seed, place, turn // count) % (2**32))
    return int(cycle.permutation(count)[turn % count])
