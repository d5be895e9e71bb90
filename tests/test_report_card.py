"""The model card of a bundle. That it holds a real run's figures is tested with the bundles."""

from huggingface_hub import ModelCard
from rich.console import Console

from pipeline.report import card, page, show
from tests.small_reports import language_report, quality_row, request_report

ABOUT = {
    "run": "a|b",
    "experts": [],
    "top_k": 1,
    "architecture": "X",
    "trunk": {"address": "t"},
    "router": {"address": "r"},
    "start_ids": [0],
    "context_tokens": 8,
}
ABOUT_ADAPTERS = {
    "run": "look",
    "architecture": "Qwen3VLForConditionalGeneration",
    "base": {
        "model": "a/base",
        "revision": "f00d",
        "image": {"min_pixels": 1024, "max_pixels": 65_536},
    },
    "experts": [
        {
            "name": "color",
            "label": "A",
            "task": "color",
            "description": "names | colours",
            "metric": "exact",
            "address": "train_experts-color-1",
            "folder": "adapters/color",
        }
    ],
    "router": {"address": "train_router-1", "folder": "adapters/router"},
    "policy": {"threshold": 0.8, "top_k": 2, "fallback": "color"},
}


def test_a_report_cannot_break_the_cards_tables():
    row = quality_row("x|y\n<script>", "dense", 1.0, domains=())
    text = card(language_report(quality=[row], domains=(), notes=["a\nb"]), ABOUT)
    (line,) = [x for x in text.splitlines() if "script" in x]
    assert line.startswith("| x\\|y &lt;script> |")
    assert "# a\\|b" in text
    assert "- a b" in text


def test_the_hub_reads_library_and_task_from_the_front_matter():
    for report, about, library, task in (
        (language_report(), ABOUT, "transformers", "text-generation"),
        (request_report(), ABOUT_ADAPTERS, "peft", "image-text-to-text"),
    ):
        found = ModelCard(card(report, about))
        assert found.data.library_name == library
        assert found.data.pipeline_tag == task
        assert "mixture-of-experts" in found.data.tags
        assert found.text.lstrip().startswith("# ")


def test_the_size_of_an_expert_is_told_everywhere():
    """On the terminal, on the page and in the card; nowhere where a report does not know it."""
    known = language_report()
    old = language_report(model=known.model.model_copy(update={"expert_bytes": None}))
    for report, told in ((known, True), (old, False)):
        console = Console(record=True, width=200)
        show(report, console)
        assert ("An expert's own weights are 4.91 MB, as stored." in console.export_text()) == told
        assert ("own weights are 4.91 MB" in card(report, ABOUT)) == told
        assert ("4.91 MB" in page(report, {})) == told


def test_every_section_of_an_adapters_card_is_there():
    text = card(request_report(), ABOUT_ADAPTERS)
    for heading in ("## Experts", "## Use", "## How good it is", "## To know"):
        assert heading in text
    assert "names \\| colours" in text
    assert 'revision="f00d"' in text
    assert "| **router** |" in text
    assert "1,024 to 65,536 px" in " ".join(text.split())
