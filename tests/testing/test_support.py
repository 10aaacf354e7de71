"""The support page says what the verdicts are."""

from __future__ import annotations

from pathlib import Path

from persample.testing import Verdict, support

PAGE = Path(__file__).parents[2] / "docs" / "support.md"


def test_what_is_written_is_read() -> None:
    kinds = ["exact", "refused", "caught"]
    verdicts = {}
    for number, name in enumerate(support.ZOO):
        for shift, backend in enumerate(("first", "second")):
            kind = kinds[(number + shift) % 3]
            verdicts[name, backend] = Verdict(kind, "" if kind == "exact" else f"Reason {number % 7}.")
    page = support.page(verdicts)
    assert support.read(page) == {key: verdict.kind for key, verdict in verdicts.items()}
    assert page.count("Reason 3.") == 1


def test_the_short_page_has_twenty_rows_of_the_whole_one() -> None:
    whole, short = (support.read(path.read_text(encoding="utf-8")) for path in (PAGE, support.short_path(PAGE)))
    assert short == {key: kind for key, kind in whole.items() if key[0] in support.SHORT}
    assert len({name for name, _ in short}) == 20
