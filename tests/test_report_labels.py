"""A domain is shown by what its data calls it, wherever a report is shown."""

import io

from markupsafe import escape
from rich.console import Console
from small_reports import DOMAINS, NASTY, histories, language_report
from test_report_card import ABOUT

from pipeline.report import card, page, read, show
from pipeline.report.labels import with_labels

LABELS = dict(zip(DOMAINS, ("Family law", "C++", "法律 [red]|é"), strict=True))


def shown(report) -> str:
    """Return what a terminal shows of a report."""
    sink = io.StringIO()
    show(report, Console(file=sink, width=300, no_color=True, force_terminal=False))
    return sink.getvalue()


def test_every_table_has_the_labels():
    report = language_report(labels=LABELS)
    entry = {"address": "e", "file": "x"}
    experts = [entry | {"name": n, "domain": n, "label": LABELS[n]} for n in DOMAINS]
    about = ABOUT | {"experts": experts}
    texts = {
        "terminal": shown(report),
        "page": page(report, histories()),
        "card": card(report, about),
    }
    for place, text in texts.items():
        for label in LABELS.values():
            wanted = str(escape(label)) if place == "page" else label
            found = wanted in text or wanted.replace("|", "\\|") in text
            assert found, (place, label)
    # The values stay where they were
    plain = language_report()
    renamed = with_labels(report)
    for before, after in zip(plain.quality, renamed.quality, strict=True):
        assert list(before.bits_per_byte.values()) == list(after.bits_per_byte.values())
        assert list(after.bits_per_byte) == list(LABELS.values())
        assert before.kind == after.kind
    assert read(report.to_json()) == report
    assert with_labels(plain) is plain


def test_a_label_is_text_and_nothing_else():
    report = language_report(labels={DOMAINS[0]: NASTY})
    text = page(report, histories())
    assert "<script>alert" not in text
    assert "\x1b[31m" not in shown(report)


def test_words_of_the_report_are_no_domains():
    words = ("python", "model", "mean", "part", "router", "dense", "kind", "experts")
    plain = language_report()
    renamed = with_labels(language_report(labels=dict.fromkeys(words, "Other")))
    for before, after in zip(plain.quality, renamed.quality, strict=True):
        assert (before.kind, before.axis, before.mean) == (after.kind, after.axis, after.mean)
    assert renamed.machine == plain.machine and renamed.model == plain.model
    assert type(renamed).model_validate(renamed.model_dump()) == renamed
