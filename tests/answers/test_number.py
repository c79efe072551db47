"""Numbers: one value for each way to write one, and nothing read that is not surely one number."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.lib.answers.number import MAX_TEXT_CHARACTERS, canonical_number, read_number, same_number
from stages.lib.answers.words import (
    AFTER,
    APART,
    CARDINALS,
    HEDGES,
    NAMES,
    PARTS,
    PLAIN,
    SCALES,
    THINGS,
    UNITS,
    find_unit,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("18", "18"), ("  18\n", "18"), ("+18", "18"), ("018", "18"), ("0", "0"), ("-0", "0"), ("0.0", "0"),
        ("1,200", "1200"), ("12,345,678", "12345678"), ("-1,200.50", "-2401/2"), ("1{,}200", "1200"),
        ("$18", "18"), ("$ 18", "18"), ("-$18", "-18"), ("$-18", "-18"), ("18€", "18"), ("$1,200.00", "1200"),
        (r"\$18", "18"), ("18.", "18"), (".5", "1/2"), ("2.50", "5/2"), ("1e5", "100000"), ("2.5E-1", "1/4"),
        ("-3", "-3"), ("- 3", "-3"), ("\u22123", "-3"), ("\u20133", "-3"), ("\uff0d3", "-3"),
        ("1/2", "1/2"), ("2/4", "1/2"), ("3 / 4", "3/4"), ("50%", "50"), ("50 %", "50"), (r"50\%", "50"), ("90°", "90"),
        (r"\boxed{42}", "42"), ("$42$", "42"), (r"\(42\)", "42"), (r"\frac{1}{2}", "1/2"), (r"-\dfrac{3}{6}", "-1/2"),
        (r"$\boxed{1,200}$", "1200"), ("**18**", "18"), ("`18`", "18"), ("9" * 100, "9" * 100),
        ("The answer is $1,200.", "1200"), ("She pays -3 euros", "-3"), ("x=18", "18"), ("Answer: 1/2 of a cup", "1/2"),
        ("**18** apples!", "18"), ("It is **18**.", "18"), ("3 T-shirts", "3"), ("-5°C", "-5"), ("70 °F", "70"),
        (r"18\text{ million}", "18000000"), (r"\boxed{18}.", "18"), ("The answer is\n18\n", "18"), ("2^-2", "1/4"),
    ],
)  # fmt: skip
def test_a_number_has_one_value(text, expected):
    assert canonical_number(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "$", "-", ".", "%", "forty-two", "none", "NaN", "nan", "inf", "-inf", "Infinity", "1e999", "1e-999",
        "9" * 101, "42 or forty-three", "42-43", "42\n43", "(1, 2)", "10:30", "3.14.15", "1.2e3.4", "2 + 2 = 4",
        "5 + x", "3x", "3 x", "f(3)", "|-18|", "<18", "18?5", "1,20", "1,2", "1,2000", "1,200,30", ",5", "1/0", "0/0",
        "1/2/3", "1.5/2",
        "1/2.5", "1e5/2", "1/-2", "--5", "-+5", "$-$5", "$$5", "5! = 120", "18th", "v18", "0x1F", "1e",
        "e5", "half of 18", "²", "五", "Ⅷ", "18 and 五", r"\sqrt{16}", r"\frac{1}{x}", r"\frac{1}{0}", r"\frac{1}{2}x",
        "x^{2}", r"\boxed{42} or \boxed{43}", "18\x00", "18\u200b", "84/2", "-6/3", "0/5", r"\frac{84}{2}", "2^999",
        "1" * (MAX_TEXT_CHARACTERS + 1), " " * MAX_TEXT_CHARACTERS + "18",
    ],
)  # fmt: skip
def test_what_is_not_surely_one_number_is_not_read(text):
    assert read_number(text) is None
    assert canonical_number(text) is None


@pytest.mark.slow
@settings(max_examples=2000)
@given(st.text(alphabet="0123456789+-−.,/eE$€%° \n\\{}()fracboxd*^_'`=orxk½²４٤", max_size=40))
def test_canonical_is_exact_and_never_raises(text):
    form = canonical_number(text)
    if form is not None:
        assert canonical_number(form) == form
        assert str(Fraction(form)) == form


@given(st.fractions(max_denominator=10**12))
def test_every_fraction_is_its_own_canonical_form(number):
    assert canonical_number(str(number)) == str(number)


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**15), max_value=10**15, places=6))
def test_decimals_are_read_exactly(number):
    assert read_number(f"{number:,f}").value == Fraction(number)


@given(st.integers(-(10**9), 10**9), st.text(alphabet="abcdefghijklmnopqrstuvwxyzäöüßéñ", min_size=2, max_size=9))
def test_a_word_that_is_not_known_is_never_passed_over(number, word):
    kept = (PLAIN, APART, AFTER, HEDGES, NAMES, SCALES, CARDINALS, "minus negative below mph kph kmh".split())
    known = find_unit(word) or any(word in words for words in kept) or word.removesuffix("s") in (*PARTS, "halve")
    for text in (f"{number} {word}", f"{word} {number}", f"{number} {word} in total", f"{number}{word}"):
        assert known or read_number(text) is None


def test_no_word_that_scales_turns_or_denies_is_among_those_that_are_passed_over():
    telling = """
        not no never none nor neither or but except without less fewer under over below above than until from twice
        double triple half third quarter tenth minus negative plus times lakh crore hundred thousand million billion
        dozen score gross pm am oclock loss lost lose debt owe owes short off squared cubed root square factorial
        almost nearly between if unless wrong incorrect false may march monday first second
    """.split()
    assert sorted(word for word in telling if word in PLAIN or word in APART or word in HEDGES or word in AFTER) == []


@pytest.mark.parametrize("word", sorted(APART))
def test_a_word_that_stands_apart_is_none_at_once_before_a_number(word):
    assert word not in PLAIN
    for text in (
        f"{word} 4",
        f"The {word} 4",
        f"it is {word} (4)",
        f'{word} "4"',
        f"{word} **4**",
        f"{word} $4",
        f"{word} -4",
    ):
        assert read_number(text) is None, text
    for text in (f"The {word} is 4", f"{word}: 4", f"There are {word} of them: 4"):
        assert canonical_number(text) == "4", text


def test_a_unit_is_spelled_once_and_no_thing_is_a_scale():
    assert not set(SCALES) & (THINGS | PLAIN | APART | set(UNITS))
    assert find_unit("boxes") == find_unit("box")
    assert find_unit("T-shirts") == find_unit("t-shirt")
    assert find_unit("Dutzend") is find_unit("dozens") is None


@pytest.mark.parametrize(
    "text",
    ["9" * 10**6, "1" + ",111" * 250_000, "-" * 10**6, "1e" + "9" * 10**6, " " * 10**6, "a-" * 500, "$ " * 500,
     "1 " * 500, "(" * 1000, "1/" * 500, "1." * 500, "\\frac{" * 150, "**" * 500, "one " * 250, "- " * 500, "_" * 1000,
     "\\text{" * 160, "$1$" * 333, "1" + " 111" * 249 + " 1", "1" + "'111" * 249 + "1", "x_" * 500, "½" * 1000,
     "a " * 500,
     "1" + ",11" * 333, "one and " * 120, "minus " * 160, "0." + "12" * 400 + "3...", "half " * 200, "per " * 250],
    ids=lambda text: f"{text[:4]}... x {len(text)}",
)  # fmt: skip
def test_no_text_takes_long(text):
    start = time.process_time()
    assert canonical_number(text) is None
    assert time.process_time() - start < 0.1


@pytest.mark.parametrize(
    ("true", "given", "tolerance", "same"),
    [
        ("33.333333333333336", "33.3", "0.002", True),
        ("33.333333333333336", "33.3", "0.0005", False),
        ("33.333333333333336", "33.33", "0.0005", True),
        ("33.333333333333336", "33.33", "0", False),
        ("33.333333333333336", "33.333333333333336", "0", True),
        ("33.333333333333336", "100/3", "0", True),
        ("33.3", "33.4", "0.009", False),
    ],
)
def test_a_float_is_as_near_as_the_source_states(true, given, tolerance, same):
    assert same_number(read_number(true), read_number(given), Fraction(tolerance)) is same


@pytest.mark.parametrize(
    ("text", "decimal", "value"),
    [
        ("1.234", ".", "1.234"), ("1.234", ",", "1234"), ("1,234", ".", "1234"), ("1,234", ",", "1.234"),
        ("3,5", ",", "3.5"), ("3.5", ",", "3.5"), ("1.234,56", ",", "1234.56"), ("1.234.567", ",", "1234567"),
        ("3,5 Euro", ",", "3.5"), ("-1,5", ",", "-1.5"), ("42", ",", "42"),
    ],
)  # fmt: skip
def test_the_sign_before_the_decimals_is_the_one_that_is_stated(text, decimal, value):
    assert read_number(text, decimal).value == Fraction(value)


@pytest.mark.parametrize(("text", "decimal"), [("3,5", "."), ("1.234,56", "."), ("1,234.56", ","), ("3,5,6", ",")])
def test_separators_of_the_other_sort_are_not_read(text, decimal):
    assert read_number(text, decimal) is None
