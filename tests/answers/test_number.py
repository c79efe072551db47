"""Canonical answers: one form a number, and nothing read that is not surely one number."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.lib.answers.number import (
    MAX_TEXT_CHARACTERS,
    canonical_number,
    find_number,
    given_number,
    gsm8k_final,
    number_value,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("18", "18"), ("  18\n", "18"), ("+18", "18"), ("018", "18"), ("0", "0"), ("-0", "0"), ("0.0", "0"),
        ("1,200", "1200"), ("12,345,678", "12345678"), ("-1,200.50", "-2401/2"), ("1{,}200", "1200"),
        ("$18", "18"), ("$ 18", "18"), ("-$18", "-18"), ("$-18", "-18"), ("18€", "18"), ("$1,200.00", "1200"),
        (r"\$18", "18"),
        ("18.0", "18"), ("18.", "18"), (".5", "1/2"), ("2.50", "5/2"), ("1e5", "100000"), ("2.5E-1", "1/4"),
        ("-3", "-3"), ("- 3", "-3"), ("\u22123", "-3"), ("\u20133", "-3"), ("\uff0d3", "-3"),
        ("1/2", "1/2"), ("2/4", "1/2"), ("-6/3", "-2"), ("3 / 4", "3/4"), ("0/5", "0"),
        ("50%", "50"), ("50 %", "50"), (r"50\%", "50"), ("90°", "90"),
        (r"\boxed{42}", "42"), ("$42$", "42"), (r"\(42\)", "42"), (r"\frac{1}{2}", "1/2"), (r"-\dfrac{3}{6}", "-1/2"),
        (r"$\boxed{1,200}$", "1200"), ("**18**", "18"), ("`18`", "18"), ("9" * 100, "9" * 100),
    ],
)  # fmt: skip
def test_a_number_has_one_form(text, expected):
    assert canonical_number(text) == expected
    assert number_value(text) == Fraction(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 18 dollars.", "18"),
        ("The answer is $1,200.", "1200"),
        ("She pays -3 euros", "-3"),
        ("x = 18", "18"),
        ("x=18", "18"),
        ("Answer: 1/2 of a cup", "1/2"),
        ("(18)", "18"),
        ("**18** apples!", "18"),
        ("It is **18**.", "18"),
        ("18 USD", "18"),
        ("a well-known 18", "18"),
        ("50 percent", "50"),
        ("The answer is\n18\n", "18"),
    ],
)
def test_the_only_number_among_words_is_found_but_is_not_the_whole_text(text, expected):
    assert canonical_number(text) == expected
    assert find_number(text) == Fraction(expected)
    assert number_value(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "$", "-", ".", "%", "forty-two", "none", "NaN", "nan", "inf", "-inf", "Infinity", "1e999", "1e-999",
        "9" * 101,
        "42 or 43", "42 or forty-three", "42, 43", "42-43", "42\n43", "(1, 2)", "10:30", "1 1/2", "3.14.15", "1.2e3.4",
        "2 + 2 = 4", "6 * 7", "6 x 7", "x - 5", "5 + x", "3x", "3 x", "2^10", "10^3", "f(3)", "|-18|", "<18", ">= 18",
        "~18", "18?5",
        "1,20", "1,2", "1,2000", "1,200,30", "12,34,567", "1_200", "1 200", "1\u202f200", ",5",
        "1/0", "0/0", "1/2/3", "1.5/2", "1/2.5", "1e5/2", "1/-2", "--5", "-+5", "$-$5", "$$5",
        "5!", "5! = 120", "18k", "$18k", "18kg", "18th", "v18", "GPT-4", "0x1F", "1e", "e5", "5 million", "2 dozen",
        "half of 18", "not 42", "minus 5",
        "10 k", "４２", "٤٢", "५", "²", "5²", "½", "5½", "五", "Ⅷ", "18 and 五", "1８",
        r"\sqrt{16}", r"\frac{1}{x}", r"\frac{1}{0}", r"\frac{1}{2}x", "x^{2}", r"\boxed{42} or \boxed{43}", "18\x00",
        "18\u200b",
        "1" * (MAX_TEXT_CHARACTERS + 1), " " * MAX_TEXT_CHARACTERS + "18",
    ],
)  # fmt: skip
def test_what_is_not_surely_one_number_is_not_read(text):
    assert canonical_number(text) is None
    assert find_number(text) is None
    assert number_value(text) is None


@pytest.mark.slow
@settings(max_examples=2000)
@given(st.text(alphabet="0123456789+-−.,/eE$€%° \n\\{}()fracboxd*`=orxk½²４٤", max_size=40))
def test_canonical_is_stable_exact_and_never_raises(text):
    form = canonical_number(text)
    if form is not None:
        assert canonical_number(form) == form
        assert str(Fraction(form)) == form
        assert find_number(text) == Fraction(form)


@given(st.fractions(max_denominator=10**12))
def test_every_fraction_is_its_own_canonical_form(number):
    assert canonical_number(str(number)) == str(number)


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**15), max_value=10**15, places=6))
def test_decimals_are_read_exactly(number):
    assert number_value(f"{number:,f}") == Fraction(number)


@pytest.mark.parametrize(
    "text",
    ["9" * 10**6, "1" + ",111" * 250_000, "-" * 10**6, "1e" + "9" * 10**6, " " * 10**6, "a-" * 500, "$ " * 500,
    "1 " * 500,
     "(" * 1000, "1/" * 500, "1." * 500, "\\frac{" * 150, "**" * 500],
    ids=lambda text: f"{text[:4]}... x {len(text)}",
)  # fmt: skip
def test_no_text_takes_long(text):
    start = time.perf_counter()
    assert canonical_number(text) is None
    assert time.perf_counter() - start < 0.1


def test_the_final_answer_of_gsm8k_follows_the_last_mark():
    assert gsm8k_final("a #### b\n#### 1,200") == "1,200"
    with pytest.raises(ValueError, match="no '####'"):
        gsm8k_final("The answer is 18")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("5 times", "5"), ("5 times as many", "5"), ("x times 5", None), ("3 T-shirts", "3"), ("3 x-y", None),
        ("-5°C", "-5"), ("70 °F", "70"), (r"18\text{ dollars}", "18"), (r"18\text{ million}", None),
        (r"\boxed{18}.", "18"),
        (r"The answer is \boxed{18}.", "18"), (r"\boxed{18} or \boxed{19}", None), ("**18**.", "18"),
    ],
)  # fmt: skip
def test_what_stands_around_a_number_in_a_completion(text, answer):
    assert canonical_number(text) == given_number(text) == answer


@pytest.mark.parametrize(
    "text", ["84/2", "$84/2", "840 / 20", r"\frac{84}{2}", r"\boxed{84/2}", "84/2 dollars", "42/1"]
)
def test_a_division_left_to_do_is_no_answer_of_a_completion(text):
    assert canonical_number(text) == "42"
    assert given_number(text) is None


@pytest.mark.parametrize(
    ("text", "answer"), [("2/4", "1/2"), ("1/2", "1/2"), ("$18/day", None), ("42", "42"), ("x", None)]
)
def test_a_fraction_is_an_answer_of_a_completion(text, answer):
    assert given_number(text) == answer
