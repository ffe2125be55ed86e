"""What is let out of an answer while guards still judge the rest: never a character that lies in an unjudged window."""

import random

from collector.holdback import RUN_CHARS_MAX, HoldBack, Mark

CHARS = 64


def streamed(pieces: list[str], chars: int = CHARS, *, slack: int = 0) -> tuple[list[str], list[int]]:
    """Feed the pieces of one text; the windows that were judged, and after each piece how far the text may go out."""
    hold, windows, out, marks, safe = HoldBack(chars, slack=slack), list[str](), list[int](), list[Mark](), 0
    for piece in pieces:
        marks.append(hold.grow("text", piece))
        if hold.due:
            windows += hold.windows()
            hold.pass_()
        while marks and hold.free([marks[0]]):
            safe = marks.pop(0).chars
        out.append(safe)
    return [*windows, *hold.rest()], out


def drawn(seed: int) -> tuple[list[str], random.Random]:
    """A text in random pieces."""
    draw = random.Random(seed)  # noqa: S311 - repeatable, no secret
    alphabet = draw.choice(["ab ", "abcdefgh \n", "日本語 ", "0123456789 -"])
    return ["".join(draw.choices(alphabet, k=draw.randint(0, 20))) for _ in range(draw.randint(20, 120))], draw


def test_whatever_leaves_was_judged_with_all_that_stands_around_it() -> None:
    """Every stretch as long as the window lies in one judged window, and was judged before any of it left."""
    for seed in range(80):
        pieces, _ = drawn(seed)
        text = "".join(pieces)
        hold, marks, judged = HoldBack(CHARS), list[Mark](), list[tuple[int, int]]()
        for piece in pieces:
            marks.append(hold.grow("text", piece))
            if hold.due:
                start = hold._texts["text"].start
                for window in hold.windows():
                    assert text[start : start + len(window)] == window
                    judged.append((start, len(window)))
                hold.pass_()
            while marks and hold.free([marks[0]]):
                end = marks.pop(0).chars
                for start in range(max(0, end - CHARS), end):
                    stop = start + CHARS
                    assert any(at <= start and stop <= at + size for at, size in judged), f"seed {seed}"


def test_a_secret_across_any_boundary_is_found_before_its_first_character_leaves() -> None:
    """Wherever the stream parts it: a window has it whole, and until then nothing of it is out."""
    for seed in range(300):
        pieces, draw = drawn(seed)
        secret = "KEY " + "x" * 30 + " END"
        text = "".join(pieces)
        at = draw.randint(0, len(text))
        text = f"{text[:at]} {secret} {text[at:]} and more words to come, as answers have" + " word" * 40
        cuts = sorted(draw.sample(range(1, len(text)), 60))
        windows, out = streamed([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)])
        found = next((number for number, window in enumerate(windows) if secret in window), None)
        assert found is not None, f"seed {seed}"
        hold, marks = HoldBack(CHARS), list[Mark]()
        for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True):
            marks.append(hold.grow("text", text[a:b]))
            if hold.due and any(secret in window for window in hold.windows()):
                break  # blocked: pass_ is not called
            hold.pass_()
            while marks and hold.free([marks[0]]):
                assert marks.pop(0).chars <= at + 1, f"seed {seed}"
        assert out


def test_a_long_key_is_not_let_out_in_part() -> None:
    """A run without a blank is longer than the window and still judged in one piece."""
    key = "eyJ" + "A" * 2_000
    windows, out = streamed(["so: ", *[key[at : at + 7] for at in range(0, len(key), 7)], " ok", " word" * 40])
    assert any(key in window for window in windows)
    assert max(out[:-1]) <= len("so: ")


def test_a_run_without_end_leaves_at_last() -> None:
    """Memory and patience are bounded: beyond 8,192 characters a run is parted."""
    windows, out = streamed(["x" * 100] * 200)
    assert 0 < out[-1] < 20_000
    assert max(map(len, windows)) <= RUN_CHARS_MAX + 2 * CHARS + 200


def test_the_cost_is_a_few_times_the_text() -> None:
    """Windows overlap, and memory is what is not let go."""
    pieces = ["word "] * 4_000
    windows, _ = streamed(pieces, 256)
    assert sum(map(len, windows)) <= 12 * sum(map(len, pieces))
    assert max(map(len, windows)) <= 4 * 256


def test_a_text_that_grows_no_more_does_not_hold_up_the_next() -> None:
    """Reasoning ends where the content begins: it leaves once as much has come after it."""
    hold = HoldBack(CHARS)
    thought = hold.grow("reasoning", "a thought ")
    said = [hold.grow("content", "word ") for _ in range(40)]
    hold.windows()
    hold.pass_()
    assert hold.free([thought])
    assert [hold.free([mark]) for mark in (said[0], said[-1])] == [True, False]


def test_a_text_that_ends_with_a_word_does_not_hold_up_the_next() -> None:
    """Reasoning ends with a full stop, and arguments with a bracket, more often than with a blank."""
    hold = HoldBack(CHARS)
    thought = hold.grow("reasoning", "a thought.")
    for _ in range(2 * CHARS // 5):
        hold.grow("content", "word ")
    hold.windows()
    hold.pass_()
    assert hold.free([thought])


def test_what_another_text_parts_is_judged_whole_before_its_rest_leaves() -> None:
    """Reasoning, content and arguments of one choice in turns, each for as long as the other's end is let go."""
    for seed in range(200):
        draw = random.Random(seed)  # noqa: S311 - repeatable, no secret
        secret = draw.choice(["4111 1111 1111 1111", "KEY-" + "q7" * 20, "a b c d " * 7 + "e"])
        cut = draw.randrange(1, len(secret))
        before, after = (" word" * draw.randrange(30) + " " for _ in range(2))
        turns = [("content", before + secret[:cut]), ("reasoning", "hm, " * draw.randint(20, 60))]
        turns += [("content", secret[cut:] + after), ("reasoning", "so. " * 40), ("content", "word " * 40)]
        hold, marks, end = HoldBack(CHARS), list[Mark](), len(before + secret)
        whole = False
        for key, text in turns:
            size = draw.randint(3, 30)
            for at in range(0, len(text), size):
                mark = hold.grow(key, text[at : at + size])
                marks += [mark] if key == "content" else []
                if hold.due:
                    whole = whole or any(secret in window for window in hold.windows())
                    hold.pass_()
                while marks and hold.free([marks[0]]):
                    assert marks.pop(0).chars < end or whole, f"seed {seed}"
        assert whole, f"seed {seed}"


def test_each_choice_is_held_back_by_itself() -> None:
    """What comes in one choice says nothing of another; one that has ended is judged to its end."""
    hold = HoldBack(CHARS)
    first = hold.grow(0, "of the first ", 0)
    for _ in range(40):
        hold.grow(1, "of the second ", 1)
    hold.windows()
    hold.pass_()
    assert not hold.free([first])
    hold.end(0)
    hold.grow(1, "more " * 20, 1)
    hold.windows()
    hold.pass_()
    assert hold.free([first])


def test_token_ids_ahead_of_the_text_are_held_longer() -> None:
    """`slack`: an output leaves only when the text that its ids may tell was judged too."""
    pieces = ["word "] * 100
    plain, late = streamed(pieces)[1], streamed(pieces, slack=20)[1]
    assert all(b <= max(0, a - 15) for a, b in zip(plain, late, strict=True))


def test_a_text_that_comes_from_its_beginning_each_time_is_taken_as_its_growth() -> None:
    """As the engine gives it when it is asked for all so far."""
    whole, pieces, text = HoldBack(CHARS), HoldBack(CHARS), ""
    for _ in range(60):
        text += "word "
        assert whole.grown_to(0, text) == pieces.grow(0, "word ")
        assert whole.windows() == pieces.windows()
        whole.pass_()
        pieces.pass_()
