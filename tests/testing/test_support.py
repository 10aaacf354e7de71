"""The support page says what the verdicts are."""

from __future__ import annotations

from persample.testing import Verdict, support


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
