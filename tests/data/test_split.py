"""The split is a function of the prompts and the seed: not of row order, not of other rows."""

import hashlib
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimepo.data.split import PAPER_SPLIT, fingerprint, part_of, row_hash, split
from slimepo.errors import InputError
from slimepo.types import Preference, Unpaired


def row(prompt, chosen="good", rejected="bad", source=""):
    return Preference(
        [{"role": "user", "content": prompt}],
        [{"role": "assistant", "content": chosen}],
        [{"role": "assistant", "content": rejected}],
        source,
    )


THOUSANDS = [row(f"question {i}") for i in range(20_000)]

prompts = st.lists(st.text(st.characters(codec="utf-8"), max_size=8), max_size=12)
fractions = st.lists(st.floats(0, 0.3), min_size=1, max_size=3).map(
    lambda f: {f"part{i}": x for i, x in enumerate(f)}
)
seeds = st.integers(0, 2**32)


@given(prompts, fractions, seeds, st.randoms(use_true_random=False))
def test_row_order_does_not_matter(texts, parts, seed, random):
    rows = [row(text, chosen=str(i)) for i, text in enumerate(texts)]
    shuffled = random.sample(rows, len(rows))
    one, other = split(rows, parts, seed), split(shuffled, parts, seed)
    assert {name: fingerprint(part) for name, part in one.items()} == {
        n: fingerprint(p) for n, p in other.items()
    }


@given(prompts, prompts, fractions, seeds)
def test_more_rows_never_move_the_others(texts, more, parts, seed):
    before = split([row(text) for text in texts], parts, seed)
    after = split([row(text) for text in texts + more], parts, seed)
    for name, part in before.items():
        assert after[name][: len(part)] == part


@given(prompts, fractions, seeds)
def test_parts_are_disjoint_and_equal_prompts_stay_together(texts, parts, seed):
    rows = [row(text, chosen=str(i)) for i, text in enumerate(texts * 2)]
    where = {}
    for name, part in split(rows, parts, seed).items():
        for each in part:
            assert where.setdefault(each.prompt[0]["content"], name) == name
    assert sum(map(len, split(rows, parts, seed).values())) <= len(rows)


@given(st.text(st.characters(codec="utf-8"), max_size=20), seeds)
def test_prompts_that_differ_in_white_space_alone_stay_together(text, seed):
    shares = {f"part{i}": 0.01 for i in range(100)}
    spread = "\n" + "  ".join(text.split()) + "\t"
    assert part_of(row(text).prompt, shares, seed) == part_of(row(spread).prompt, shares, seed)


def test_shares_are_what_was_asked_for():
    parts = split(THOUSANDS, PAPER_SPLIT, 0)
    assert list(parts) == ["sft", "preference", "heldout"]
    assert sum(map(len, parts.values())) == len(THOUSANDS)
    for name, share in PAPER_SPLIT.items():
        # Five standard deviations of a binomial count.
        slack = 5 * math.sqrt(len(THOUSANDS) * share * (1 - share))
        assert abs(len(parts[name]) - share * len(THOUSANDS)) < slack


def test_another_seed_is_another_split_independent_of_the_first():
    share = {"half": 0.5}
    one = {row_hash(r) for r in split(THOUSANDS, share, 0)["half"]}
    other = {row_hash(r) for r in split(THOUSANDS, share, 1)["half"]}
    both = len(one & other)
    assert abs(both - len(THOUSANDS) / 4) < 5 * math.sqrt(len(THOUSANDS) * 0.25 * 0.75)


def test_what_the_fractions_leave_over_is_in_no_part():
    assert split(THOUSANDS[:50], {"none": 0.0}, 0) == {"none": []}
    assert len(split(THOUSANDS[:50], {"all": 1.0}, 0)["all"]) == 50


def test_a_row_stands_where_the_hash_of_seed_and_prompt_says():
    """Worked by hand, since a change here would leak held-out rows of existing runs into training."""
    for i in range(200):
        canonical = f'[7,[{{"content":"question {i}","role":"user"}}]]'
        point = int(hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest(), 16) / 2**64
        expected = "sft" if point < 0.33 else "preference" if point < 0.99 else "heldout"
        assert part_of(row(f"question {i}").prompt, PAPER_SPLIT, 7) == expected


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"a": 0.7, "b": 0.4}, "sum to 1.1"),
        ({"a": -0.1}, "'a' is -0.1"),
        ({"a": math.nan}, "'a' is nan"),
        ({"a": 1.5}, "'a' is 1.5"),
    ],
)
def test_impossible_fractions_are_refused(fractions, message):
    with pytest.raises(InputError, match=message):
        split([], fractions, 0)


def test_a_fingerprint_ignores_order_and_source_but_no_content():
    rows = [row("a", source="x:1"), row("b"), row("b")]
    assert fingerprint(rows) == fingerprint([row("b"), row("b"), row("a", source="y:9")])
    assert fingerprint(rows) != fingerprint(rows[:2])
    assert row_hash(row("a")) != row_hash(row("a", chosen="better"))
    assert row_hash(row("a")) != row_hash(replace(row("a"), template_options={"enable_thinking": False}))
    answer = [{"role": "assistant", "content": "x"}]
    assert row_hash(Unpaired([], answer, True)) != row_hash(Unpaired([], answer, False))
    assert row_hash(Unpaired([], answer, True)) != row_hash(Unpaired([], answer, True, weight=2.0))


def test_unpaired_rows_with_the_same_prompt_go_where_the_pairs_go():
    pairs = split(THOUSANDS[:100], PAPER_SPLIT, 3)
    singles = split([Unpaired(r.prompt, r.chosen, True) for r in THOUSANDS[:100]], PAPER_SPLIT, 3)
    assert {n: [r.prompt for r in p] for n, p in pairs.items()} == {
        n: [r.prompt for r in p] for n, p in singles.items()
    }
