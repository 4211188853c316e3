"""Regular expressions from users and files, matched in time linear in the text.

Python's matcher backtracks. Some patterns keep it busy for hours while it holds the interpreter lock. This module
compiles patterns into a nondeterministic automaton and follows all of its states at once (Thompson 1968). It computes
the transition of each set of states once per character (a lazy deterministic automaton, as in RE2). Python's own parser
reads the patterns, so the syntax is Python's, except for features that such an automaton cannot express: look-around,
backreferences and atomic groups.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence

try:
    from re import _constants as ops
    from re import _parser as parser
except ImportError:  # Python before 3.11
    import sre_constants as ops
    import sre_parse as parser

from .errors import SettingsError

_LONGEST = 300
# Limits on the states of one pattern, where bounded repeats are unrolled, and of all patterns together.
_MOST_STATES = 1000
_MOST_TOGETHER = 500_000
# Limit on states that are active at once, averaged over a text.
_MOST_LIVE = 2000
# Limit on states in all cached sets together.
_KEPT = 200_000
# Limit on states to visit, about ten seconds of work. 960 keys, one per layer of a large model, visit a fifth of it.
_MOST_VISITED = 4_000_000
# Plain integers, because operations on `re.RegexFlag` are slow.
_IGNORECASE, _DOTALL = int(re.IGNORECASE), int(re.DOTALL)
_OTHER_FLAGS = ~int(re.IGNORECASE | re.DOTALL | re.VERBOSE | re.UNICODE)

_CATEGORIES: dict[object, Callable[[str], bool]] = {
    ops.CATEGORY_DIGIT: str.isdecimal,
    ops.CATEGORY_NOT_DIGIT: lambda letter: not letter.isdecimal(),
    ops.CATEGORY_SPACE: str.isspace,
    ops.CATEGORY_NOT_SPACE: lambda letter: not letter.isspace(),
    ops.CATEGORY_WORD: lambda letter: _is_word(letter),
    ops.CATEGORY_NOT_WORD: lambda letter: not _is_word(letter),
}
_UNSUPPORTED = {
    "ASSERT": "look-around",
    "ASSERT_NOT": "look-around",
    "FAILURE": "look-around",
    "GROUPREF": "a backreference",
    "GROUPREF_IGNORE": "a backreference",
    "GROUPREF_EXISTS": "a condition on a group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive repeat",
}


class PatternError(SettingsError):
    """Error about an unusable pattern. Its message continues a sentence that begins with the pattern.

    Attributes:
        pattern: the refused pattern; empty if the message is about all patterns together.
    """

    pattern = ""


def regex_problem(pattern: str) -> str:
    """Return the reason to refuse a regular expression, as the rest of a sentence; empty for a usable one."""
    try:
        Patterns([pattern])
    except PatternError as error:
        return error.message
    return ""


@functools.lru_cache(maxsize=8)
def search_patterns(patterns: tuple[str, ...]) -> Patterns:
    """Return cached `Patterns` that match anywhere in a text."""
    return Patterns(patterns)


class Budget:
    """Number of states that searches may still visit. Searches for one user or one file share it."""

    def __init__(self, states: int | None = None):
        self.left = _MOST_VISITED if states is None else states


class Patterns:
    """Several regular expressions, matched together.

    Args:
        whole: match as peft matches the keys of `rank_pattern`: the whole text, or everything after one of its dots.
            If False, match anywhere in the text, as `re.search` does.
        budget: limit on the states to visit, over all texts together; an own one by default.

    Raises:
        PatternError: a pattern is unusable.
    """

    def __init__(self, patterns: Sequence[str], whole: bool = False, budget: Budget | None = None):
        # Per state: the character that it consumes or a test for it (None if it consumes none), and the next states.
        self._tests: list[str | Callable[[str], bool] | None] = []
        self._edges: list[list[int]] = []
        self._conditions: dict[int, Callable[[str, str], bool]] = {}
        self._ends: dict[int, int] = {}
        self._room = 0
        entries = []
        for number, pattern in enumerate(patterns):
            try:
                entries.append(self._compile(pattern, number, whole))
            except PatternError as error:
                error.pattern = pattern
                raise
        self._room = _MOST_STATES
        self._budget = budget or Budget()
        fork = self._state(edges=entries)
        self._anywhere = not whole
        self._start = self._sequence(parser.parse(r"(?:.*\.)?"), fork, 0) if whole else fork
        self._sets: dict[tuple[frozenset[int], str], dict[str, tuple]] = {}
        self._kept = 0

    def first(self, text: str) -> int | None:
        """Return the index of the first pattern that matches, None if none does.

        Raises:
            PatternError: the search visits too many states.
        """
        first = None
        key = (frozenset([self._start]), "")
        work = 0
        for letter in _letters(text):
            known = self._sets.get(key, {}).get(letter) or self._step(key, letter)
            key, end, cost = known
            work += cost
            if end is not None and (first is None or end < first):
                first = end
            if first == 0 or not key[0]:
                break
            if work > _MOST_LIVE * (len(text) + 1) or self._budget.left < 0:
                raise PatternError(
                    "The patterns can match in too many ways at once.",
                    "Use fewer patterns, or patterns without repeats.",
                )
        return first

    def _step(self, key: tuple[frozenset[int], str], letter: str) -> tuple:
        """Compute one transition of a set of states.

        Returns:
            (next key: the next set and the character before it; first pattern that ends here; states visited).
        """
        live = self._closure(*key, letter)
        ends = [self._ends[state] for state in live if state in self._ends]
        after = set()
        for state in live if letter else ():
            test = self._tests[state]
            if test is not None and (test == letter[0] if isinstance(test, str) else test(letter[0])):
                after.update(self._edges[state])
        if self._anywhere and letter:
            after.add(self._start)
        transition = ((frozenset(after), letter[:1]), min(ends, default=None), len(live))
        self._budget.left -= len(live)
        self._kept += len(after) + 1
        if self._kept > _KEPT:
            self._sets.clear()
            self._kept = len(after) + 1
        self._sets.setdefault(key, {})[letter] = transition
        return transition

    def _closure(self, states: frozenset[int], before: str, letter: str) -> set[int]:
        """Return the given states and those reachable without a character, at a position between two characters."""
        live = set(states)
        pending = [state for state in states if self._tests[state] is None]
        while pending:
            state = pending.pop()
            condition = self._conditions.get(state)
            if condition is None or condition(before, letter):
                new = [other for other in self._edges[state] if other not in live]
                live.update(new)
                pending += [other for other in new if self._tests[other] is None]
        return live

    # Compilation builds the states of a pattern from its end to its beginning.

    def _compile(self, pattern: str, number: int, whole: bool) -> int:
        if len(pattern) > _LONGEST:
            raise PatternError(f"is longer than {_LONGEST} characters")
        try:
            tree = parser.parse(pattern)
            flags = int(tree.state.flags)
            self._room = _MOST_STATES
            end = self._state()
            self._ends[end] = number
            if whole:
                end = self._state(condition=_AT[ops.AT_END], edges=[end])
            _check_flags(flags)
            return self._sequence(tree, end, flags)
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternError(f"is not a regular expression ({error})") from error

    def _state(self, test=None, condition=None, edges: Sequence[int] = ()) -> int:
        self._count()
        self._tests.append(test)
        self._edges.append(list(edges))
        if condition is not None:
            self._conditions[len(self._edges) - 1] = condition
        return len(self._edges) - 1

    def _count(self) -> None:
        self._room -= 1
        if self._room < 0:
            raise PatternError(f"repeats too much: it expands to more than {_MOST_STATES} states")
        if len(self._tests) > _MOST_TOGETHER:
            raise PatternError("is one pattern too many")

    def _sequence(self, items, after: int, flags: int) -> int:
        """Compile a sequence of parser items and return its first state.

        Args:
            after: the state that follows the sequence.
        """
        for op, value in reversed(list(items)):
            after = self._item(op, value, after, flags)
        return after

    def _item(self, op, value, after: int, flags: int) -> int:
        if op is ops.LITERAL and not flags & _IGNORECASE:
            return self._state(test=chr(value), edges=[after])
        if op.name in _UNSUPPORTED:
            raise PatternError(f"contains {_UNSUPPORTED[op.name]}, which Graft does not support")
        if op is ops.SUBPATTERN:
            _, add, remove, items = value
            _check_flags(add | remove)
            return self._sequence(items, after, (flags | add) & ~remove)
        if op is ops.BRANCH:
            return self._state(edges=[self._sequence(items, after, flags) for items in value[1]])
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            return self._repeat(*value, after, flags)
        if op is ops.AT:
            return self._state(condition=_AT[value], edges=[after])
        return self._state(test=_test_of(op, value, flags), edges=[after])

    def _repeat(self, low: int, high: int, items, after: int, flags: int) -> int:
        if high is ops.MAXREPEAT:
            loop = self._state(edges=[after])
            self._edges[loop].append(self._sequence(items, loop, flags))
            before = loop
        else:
            before = after
            for _ in range(high - low):
                before = self._state(edges=[after, self._sequence(items, before, flags)])
        for _ in range(low):
            # Count each repetition: an empty item adds no states and would evade the limit.
            self._count()
            before = self._sequence(items, before, flags)
        return before


def _check_flags(flags: int) -> None:
    if flags & _OTHER_FLAGS:
        raise PatternError("sets a flag other than i, s and x, which Graft does not support")


def _letters(text: str) -> Iterator[str]:
    r"""Yield the characters of a text, then an empty string. A final line feed becomes "\n$": `$` matches before it."""
    yield from text[:-1]
    if text:
        yield "\n$" if text[-1] == "\n" else text[-1]
    yield ""


def _is_word(letter: str) -> bool:
    return letter[:1].isalnum() or letter[:1] == "_"


_AT: dict[object, Callable[[str, str], bool]] = {
    ops.AT_BEGINNING: lambda before, after: not before,
    ops.AT_BEGINNING_STRING: lambda before, after: not before,
    ops.AT_END: lambda before, after: after in ("", "\n$"),
    ops.AT_END_STRING: lambda before, after: not after,
    ops.AT_BOUNDARY: lambda before, after: _is_word(before) != _is_word(after),
    ops.AT_NON_BOUNDARY: lambda before, after: _is_word(before) == _is_word(after),
}


def _test_of(op, value, flags: int) -> Callable[[str], bool]:
    if op is ops.ANY:
        return (lambda letter: True) if flags & _DOTALL else (lambda letter: letter != "\n")
    if op is ops.NOT_LITERAL:
        return _any_of([(ops.NEGATE, None), (ops.LITERAL, value)], flags)
    return _any_of(value if op is ops.IN else [(op, value)], flags)


def _any_of(items, flags: int) -> Callable[[str], bool]:
    letters, ranges, categories, negated = set(), [], [], False
    for op, value in items:
        if op is ops.NEGATE:
            negated = True
        elif op is ops.LITERAL:
            letters.add(chr(value))
        elif op is ops.RANGE:
            ranges.append(tuple(map(chr, value)))
        else:
            categories.append(_CATEGORIES[value])

    def holds(letter: str) -> bool:
        return (
            letter in letters
            or any(low <= letter <= high for low, high in ranges)
            or any(test(letter) for test in categories)
        )

    if flags & _IGNORECASE:
        return lambda letter: any(map(holds, {letter, letter.lower(), letter.upper()})) != negated
    return lambda letter: holds(letter) != negated
