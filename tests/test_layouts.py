"""Layouts that people have their pictures and questions in: each gives the rows it holds, or one
sentence of a screen at most that names the setting."""

import base64
import csv
import gzip
import io
import json
import random

import pytest
import zstandard
from small_tasks import entry, jsonl, picture, prepared, write_rows

from pipeline.data.drop_stats import DropStats
from pipeline.data.sources import task_seen
from pipeline.errors import DataError
from pipeline.store.looking import FileSums, Looking

SCREEN = 2000  # characters
COUNT = 18
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Return a folder with the pictures 0.png to 17.png."""
    folder = tmp_path_factory.mktemp("shelf")
    for i in range(COUNT):
        picture((5, i)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def data(tmp_path, shelf):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(COUNT):
        (folder / f"{i}.png").hardlink_to(shelf / f"{i}.png")
    return folder


def row(i, **more):
    return {
        "id": f"r{i}",
        "image": f"{i}.png",
        "prompt": f"what is {i}?",
        "answer": f"it is {i}",
    } | more


def rows(**more):
    return [row(i, **more) for i in range(COUNT)]


def answers(found):
    return {each.answer for each in found.values()}


ALL = {f"it is {i}" for i in range(COUNT)}


# ---------------------------------------------------------------- chats


def turn(style, speaker, text):
    if style == "sharegpt":
        return {"from": {"user": "human", "assistant": "gpt"}.get(speaker, speaker), "value": text}
    if style == "parts":
        return {"role": speaker, "content": [{"type": "text", "text": text}]}
    return {"role": speaker, "content": text}


def chat(style, i, exchanges=1, system=False):
    turns = [turn(style, "system", "Be brief.")] if system else []
    for k in range(exchanges):
        turns.append(turn(style, "user", f"what is {i} {k}?"))
        turns.append(turn(style, "assistant", f"it is {i}" if k == 0 else f"as I said {i}"))
    return turns


@pytest.mark.parametrize("packed", [False, True], ids=["", "as text"])
@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("style", ["openai", "sharegpt", "parts"])
def test_a_chat_of_one_exchange_is_a_row(tmp_path, data, style, column, packed):
    made = []
    for i in range(COUNT):
        turns = chat(style, i, system=i % 2)
        made.append({"id": f"r{i}", "images": [f"{i}.png"]})
        made[-1][column] = json.dumps(turns) if packed else turns
    path = write_rows(data / "rows.jsonl", made)
    _, found, report = prepared(tmp_path, entry(jsonl(path)))
    assert answers(found) == ALL and report["dropped"] == {}
    assert found["r3"].prompt == "what is 3 0?"


@pytest.mark.parametrize("style", ["openai", "sharegpt", "parts"])
def test_a_chat_of_several_is_none_the_first_or_each(tmp_path, data, style):
    made = []
    for i in range(COUNT):
        made.append({"id": f"r{i}", "image": f"{i}.png", "messages": chat(style, i, 3)})
    path = write_rows(data / "rows.jsonl", made)
    with pytest.raises(DataError, match=r"18 several turns \(.*dataset\.turns to each") as caught:
        prepared(tmp_path, entry(jsonl(path)))
    assert len(str(caught.value)) < SCREEN
    _, first, _ = prepared(tmp_path, entry(jsonl(path, turns="first")), "first")
    assert answers(first) == ALL
    _, each, report = prepared(tmp_path, entry(jsonl(path, turns="each")), "each")
    assert len(each) == 3 * COUNT and report["dropped"] == {}
    assert each["r4/2"].prompt == "what is 4 1?" and each["r4/2"].group == each["r4/1"].group
    of_text = entry(jsonl(path, turns="each", pictures="none"))
    _, texts, _ = prepared(tmp_path, of_text, "texts")
    assert {texts[f"r4/{k}"].split for k in (1, 2, 3)} == {texts["r4/1"].split}


def test_pictures_may_stand_in_the_chat_or_as_pairs_of_the_cauldron(tmp_path, data):
    made = []
    for i in range(COUNT):
        address = {"url": f"{i}.png"} if i % 3 else f"{i}.png"
        asked = [{"type": "image_url", "image_url": address}, {"type": "text", "text": "what?"}]
        made.append({"messages": [turn("openai", "user", asked), *chat("openai", i)[1:]]})
        if i % 4 == 1:
            made[-1] = {
                "image": f"{i}.png",
                "texts": [{"user": "what?", "assistant": f"it is {i}"}],
            }
    path = write_rows(data / "rows.jsonl", made)
    _, found, _ = prepared(tmp_path, entry(jsonl(path)))
    assert answers(found) == ALL and all(len(each.images) == 1 for each in found.values())


WRONG_CHATS = {
    "turns out of order": chat("openai", 1)[::-1],
    "unknown speaker": [turn("openai", "tool", "x"), *chat("openai", 1)],
    "unread turn": [{"speaker": "user", "says": "x"}],
    "unread part": [turn("openai", "user", [{"type": "video", "video": "x.mp4"}])],
    "no exchange": chat("openai", 1)[:1],
}


@pytest.mark.parametrize("reason", WRONG_CHATS)
def test_a_chat_that_is_none_costs_its_row(tmp_path, data, reason):
    made = rows()
    for i in (2, 5):
        made[i] = {"image": f"{i}.png", "messages": WRONG_CHATS[reason]}
    path = write_rows(data / "rows.jsonl", made)
    _, found, report = prepared(tmp_path, entry(jsonl(path, max_bad_share=0.2)))
    assert report["dropped"] == {reason: 2} and len(found) == COUNT - 2


# ---------------------------------------------------------------- files


def as_csv(made, delimiter=","):
    out = io.StringIO()
    table = csv.DictWriter(out, list(made[0]), delimiter=delimiter)
    table.writeheader()
    table.writerows(made)
    return out.getvalue()


def as_coco(made):
    images = [{"id": i, "file_name": each["image"], "height": 40} for i, each in enumerate(made)]
    said = [{"id": 99 - i, "image_id": i, "caption": each["answer"]} for i, each in enumerate(made)]
    return json.dumps({"info": {}, "images": images, "annotations": said, "licenses": []})


FILES = {
    "rows.json": lambda made: json.dumps(made),
    "indented.json": lambda made: json.dumps(made, indent=2),
    "lines.json": lambda made: "".join(json.dumps(each) + "\n" for each in made),
    "wrapped.json": lambda made: json.dumps({"version": "1.0", "data": made}, indent=1),
    "rows.ndjson": lambda made: "".join(json.dumps(each) + "\n" for each in made),
    "rows.csv": as_csv,
    "semicolons.csv": lambda made: as_csv(made, ";"),
    "rows.tsv": lambda made: as_csv(made, "\t"),
    "captions.json": as_coco,
}
PACKINGS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", FILES)
def test_rows_are_read_whatever_file_holds_them(tmp_path, data, name, packing):
    content = PACKINGS[packing](FILES[name](rows()).encode())
    (data / (name + packing)).write_bytes(content)
    (data / "dataset_info.json").write_text("{}")
    task = entry({"source": "jsonl", "path": str(data)}, prompt="What is it?")
    _, found, report = prepared(tmp_path, task)
    assert answers(found) == ALL and report["dropped"] == {}


@pytest.mark.parametrize("name", FILES)
def test_a_torn_file_is_never_a_shorter_source(tmp_path, data, name):
    """Cut anywhere, it is an error or a row that is counted."""
    whole = FILES[name](rows()).encode()
    rng = random.Random(name)
    for cut in rng.sample(range(len(whole) // 4, len(whole) - 4), 6):
        (data / name).write_bytes(whole[:cut])
        task = entry({"source": "jsonl", "path": str(data), "max_bad_share": 0})
        told, found = refused_or_read(tmp_path, task, f"out{cut}")
        assert len(told) < SCREEN and " at 0x" not in told
        # Lines and fields that end where a row does are whole as far as anyone can tell.
        can_end = name.endswith(("csv", "tsv", "lines.json", "ndjson"))
        assert told or (can_end and len(found) < COUNT)


def refused_or_read(tmp_path, task, out):
    """Return what a task is refused with, or the rows that it gives."""
    try:
        return "", prepared(tmp_path, task, out)[1]
    except DataError as error:
        return str(error), {}


def test_what_another_source_reads_is_said(tmp_path, data):
    for name in ("train.parquet", "shard.tar", "data.zip"):
        (data / name).write_bytes(b"x")
        for path in (data / name, data):
            with pytest.raises(DataError, match=f"{name} is read by the source hub; set source"):
                prepared(tmp_path, entry({"source": "jsonl", "path": str(path)}))
        (data / name).unlink()


def test_several_lists_of_rows_ask_which(tmp_path, data):
    (data / "all.json").write_text(json.dumps({"train": rows(), "extra": rows()[:2]}))
    path = jsonl(data / "all.json")
    with pytest.raises(DataError, match="with the lists train, extra; set rows_field"):
        prepared(tmp_path, entry(path))
    _, found, _ = prepared(tmp_path, entry(path | {"rows_field": "train"}), "named")
    assert answers(found) == ALL


# ---------------------------------------------------------------- folders of images


def table_of(kind, made):
    lines = "".join(json.dumps(each) + "\n" for each in made)
    return as_csv(made) if kind == "csv" else lines


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("column", ["file_name", "image", "scan_file_name"])
@pytest.mark.parametrize("place", ["beside", "above", "below"])
def test_a_folder_with_tables_of_its_pictures(tmp_path, place, column, kind):
    """As the Hub documents it: a table in each split's folder, one above all, or one further
    down."""
    base = tmp_path / "set"
    above = []
    for split, names in (
        ("train", range(8)),
        ("validation", range(8, 12)),
        ("test", range(12, 18)),
    ):
        folder = base / split / ("deep" if place == "below" else "")
        folder.mkdir(parents=True)
        made = []
        for i in names:
            picture((5, i)).save(folder / f"{i}.png")
            made.append({column: f"{i}.png", "text": f"it is {i}"})
            above.append({column: f"{split}/{i}.png", "text": f"it is {i}"})
        if place != "above":
            (folder / f"metadata.{kind}").write_text(table_of(kind, made))
    if place == "above":
        (base / f"metadata.{kind}").write_text(table_of(kind, above))
    task = entry({"source": "folder", "path": str(base)}, prompt="Read it.", answer="{text}")
    _, found, report = prepared(tmp_path, task)
    assert answers(found) == ALL and report["dropped"] == {}
    if column != "scan_file_name" or place != "above":
        assert report["splits"] == {"train": 8, "valid": 4, "test": 6}


@pytest.mark.parametrize("depth", ["", "photos/"])
def test_folders_of_classes_give_labels(tmp_path, depth):
    base = tmp_path / "pets"
    for i in range(COUNT):
        folder = base / ("train", "val", "test")[i % 3] / ["cat", "dog", "newt"][i // 6] / depth
        folder.mkdir(parents=True, exist_ok=True)
        picture((5, i)).save(folder / f"{i}.JPG", "PNG")
    given = {"source": "folder", "path": str(base)}
    _, found, report = prepared(tmp_path, entry(given, prompt="Which?", answer="{label}"))
    assert report["splits"] == dict.fromkeys(SPLITS, 6) and answers(found) == {"cat", "dog", "newt"}
    with pytest.raises(DataError, match="no field answer .* id, image, label"):
        prepared(tmp_path, entry(given, prompt="Which?"), "unnamed")


def pets(base):
    """Write a folder for each of two classes; return the settings of their task."""
    for k, name in enumerate(("cat", "dog")):
        (base / name).mkdir(parents=True)
        for i in range(10):
            picture((9, k, i)).save(base / name / f"{i}.png")
    return entry({"source": "folder", "path": str(base)}, prompt="Which?", answer="{label}")


def test_a_folder_of_pictures_in_place_of_rows_is_told_its_source(tmp_path):
    task = pets(tmp_path / "pets")
    with pytest.raises(DataError, match="found none; .*is read with source: folder$"):
        prepared(tmp_path, entry(jsonl(tmp_path / "pets"), prompt="Which?", answer=task.answer))


def test_what_programs_leave_among_classes_is_no_class_and_no_annotation(tmp_path):
    base = tmp_path / "pets"
    task = pets(base)
    for name in (".ipynb_checkpoints", "__MACOSX/cat"):
        (base / name).mkdir(parents=True)
        picture(3).save(base / name / "0.png")
    (base / "cat/._0.png").write_bytes(b"not a picture")
    (base / "README.txt").write_text("Whose pets these are.")
    _, found, report = prepared(tmp_path, task)
    assert answers(found) == {"cat", "dog"} and len(found) == 20 and report["dropped"] == {}


def test_texts_in_a_folder_of_their_own_are_not_taken_for_a_readme(tmp_path):
    """As YOLO has them: of labels beside images no class is made."""
    base = tmp_path / "set"
    task = pets(base)
    (base / "labels").mkdir()
    (base / "labels/3.txt").write_text("0 .5 .5 .2 .2")
    with pytest.raises(DataError, match="nothing beside it is named 0.json"):
        prepared(tmp_path, task)


def test_classes_that_are_links_are_read_and_seen(tmp_path):
    """None of them was, so that a set of some lacked those without a word."""
    base = tmp_path / "pets"
    task = pets(base)
    (base / "cat").rename(base / "dog/more")
    (base / "cat").symlink_to("dog/more")
    (base / "dog/round").symlink_to("..")
    _, found, _ = prepared(tmp_path, task)
    assert [row.answer for row in found.values()].count("cat") == 10
    eye = Looking(FileSums())
    names = {each.name for each in task_seen.seen("look", task.dataset, eye)}
    assert {"cat/0.png", "dog/more/0.png"} <= names and len(names) == 30


def test_files_among_classes_that_are_not_read_are_told(tmp_path):
    base = tmp_path / "pets"
    task = pets(base)
    (base / "dog/scan.PDF").write_bytes(b"%PDF-1.7")
    # What a picture was made from is none of its own.
    (base / "dog/0.psd").write_bytes(b"8BPS")
    _, found, report = prepared(tmp_path, task)
    assert len(found) == 20 and report["dropped"] == {"unread format": 1}
    assert "dog/scan.PDF" in str(report["examples"])


@pytest.mark.parametrize("form", ["of both", "of the prompt", "of parts"])
def test_a_prompt_of_turns_is_a_chat_and_no_text(tmp_path, data, form):
    """As TRL parts prompt and completion: it was learned as JSON."""
    made = []
    for each in rows():
        parts = [{"type": "image"}, {"type": "text", "text": each.pop("prompt")}]
        each["prompt"] = parts if form == "of parts" else [{"role": "user", "content": parts}]
        if form == "of both":
            each["completion"] = [{"role": "assistant", "content": each.pop("answer")}]
        made.append(each)
    _, found, report = prepared(tmp_path, entry(jsonl(write_rows(data / "rows.jsonl", made))))
    assert answers(found) == ALL and report["dropped"] == {}
    assert found["r3"].prompt == "what is 3?" and len(found["r3"].images) == 1


@pytest.mark.parametrize("form", ["turns", "turns as JSON", "one turn", "under another name"])
def test_an_answer_of_turns_is_what_the_assistant_says(tmp_path, data, form):
    """Beside a plain prompt it was learned as JSON, with its brackets."""
    made, fields = [], {}
    for each in rows():
        turn = {"role": "assistant", "content": each.pop("answer")}
        each["answer"] = {"one turn": turn, "turns as JSON": json.dumps([turn])}.get(form, [turn])
        if form == "under another name":
            each["chosen"], fields = each.pop("answer"), {"answer": "chosen", "prompt": "asked"}
            each["asked"] = [{"from": "human", "value": each.pop("prompt")}]
        made.append(each)
    source = jsonl(write_rows(data / "rows.jsonl", made), fields=fields)
    _, found, report = prepared(tmp_path, entry(source))
    assert answers(found) == ALL and report["dropped"] == {}
    assert found["r3"].prompt == "what is 3?"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ([("human", "what?"), ("gpt", "it is")], "turns of user, assistant stand"),
        ([("gpt", "it is"), ("gpt", "it is")], "turns of assistant, assistant stand"),
        ([("human", "it is")], "turns of user stand"),
    ],
)
def test_an_answer_of_other_turns_costs_its_row(tmp_path, data, answer, told):
    """Of questions and answers in a list all would have counted as right answers."""
    made = rows()
    made[3]["answer"] = [{"from": speaker, "value": text} for speaker, text in answer]
    source = jsonl(write_rows(data / "rows.jsonl", made), max_bad_share=0.2)
    _, found, report = prepared(tmp_path, entry(source))
    assert report["dropped"] == {"turns in a text": 1} and "r3" not in found
    assert f"rows.jsonl:4: {told} where a text of assistant" in str(report["examples"])


def test_an_answer_of_json_that_is_no_turn_stays_as_it_is(tmp_path, data):
    made = rows()
    for each in made:
        each["answer"] = '[{"role":  "manager", "content": "all"}]'
    _, found, report = prepared(tmp_path, entry(jsonl(write_rows(data / "rows.jsonl", made))))
    assert answers(found) == {made[0]["answer"]} and report["dropped"] == {}


@pytest.mark.parametrize("text", ["<img>{}</img>", "Picture 1: <img>{}</img>\nwhat is it?"])
def test_a_picture_that_only_the_prompt_names_is_told_by_its_path(tmp_path, data, text):
    made = rows()
    for each in made:
        each["prompt"] = text.format(each.pop("image"))
    told = r"none in column 'image', and the prompt names one, '0\.png'; write its path"
    with pytest.raises(DataError, match=told):
        prepared(tmp_path, entry(jsonl(write_rows(data / "rows.jsonl", made))))


def test_ids_of_coco_match_as_text_and_annotations_of_no_picture_are_told(tmp_path, data):
    """Numbers in one list and digits in the other matched nothing; others were left out unsaid."""
    made = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(COUNT)],
        "annotations": [{"image_id": str(i), "caption": f"it is {i}"} for i in range(COUNT + 3)],
    }
    path = data / "captions.json"
    path.write_text(json.dumps(made))
    task = entry(jsonl(path, max_bad_share=0.1), prompt="Describe.")
    _, found, report = prepared(tmp_path, task)
    assert answers(found) == ALL and report["dropped"] == {"annotations of no picture": 1}
    told = report["examples"]["annotations of no picture"][0]
    assert f"annotations: 3 of {COUNT + 3} annotations" in told and f"first {COUNT};" in told


# ---------------------------------------------------------------- JSON in a column


def test_json_in_a_text_column_is_looked_into(tmp_path, data):
    """As CORD has it: what is right stands in one column of text."""
    made = []
    for i in range(COUNT):
        truth = {"gt_parse": {"menu": [{"nm": f"it is {i}"}]}, "boxes": [[1, 2, 30, 20]]}
        made.append({"image": f"{i}.png", "ground_truth": json.dumps(truth)})
    path = write_rows(data / "rows.jsonl", made)
    fields = {"answer": "ground_truth.gt_parse.menu.0.nm", "boxes": "ground_truth.boxes"}
    _, found, _ = prepared(tmp_path, entry(jsonl(path, fields=fields), prompt="Read."))
    assert answers(found) == ALL and all(each.extra["boxes"] for each in found.values())
    whole = {"answer": "ground_truth.gt_parse"}
    _, parsed, _ = prepared(tmp_path, entry(jsonl(path, fields=whole), prompt="Read."), "whole")
    assert {json.loads(text)["menu"][0]["nm"] for text in answers(parsed)} == ALL


# ---------------------------------------------------------------- pictures in rows


def content(i, form="PNG"):
    out = io.BytesIO()
    picture((5, i), (60, 50)).save(out, form)
    return out.getvalue()


def spelled(i, form="PNG"):
    return base64.b64encode(content(i, form)).decode()


IN_ROWS = {
    "a data: URI": lambda i: f"data:image/png;base64,{spelled(i)}",
    "one with a charset": lambda i: f"data:image/jpeg;charset=utf-8;BASE64,{spelled(i, 'JPEG')}",
    "bare base64": spelled,
    "of a JPEG": lambda i: spelled(i, "JPEG"),
    "of a WebP": lambda i: spelled(i, "WEBP"),
    "in lines": lambda i: base64.encodebytes(content(i)).decode(),
    "of addresses": lambda i: base64.urlsafe_b64encode(content(i)).decode(),
    "without its end": lambda i: spelled(i).rstrip("="),
    "in an object": lambda i: {"bytes": spelled(i), "path": None},
    "as of a chat": lambda i: {"url": f"data:image/png;base64,{spelled(i)}"},
    "in a list": lambda i: [spelled(i)],
    "in a list as text": lambda i: json.dumps([spelled(i)]),
}


@pytest.mark.parametrize("form", IN_ROWS)
def test_pictures_that_stand_in_rows_are_read(tmp_path, form):
    (tmp_path / "data").mkdir()
    made = [row(i, image=IN_ROWS[form](i)) for i in range(COUNT)]
    path = write_rows(tmp_path / "data/rows.jsonl", made)
    metrics, found, report = prepared(tmp_path, entry(jsonl(path)))
    assert answers(found) == ALL and metrics["pictures"] == COUNT and report["dropped"] == {}


def test_a_uri_of_a_file_is_its_path(tmp_path, data):
    """As chats of Qwen-VL have it; outside the root it is refused as any path."""
    folder = tmp_path / "data/my pictures"
    folder.mkdir()
    made = [row(i) for i in range(COUNT)]
    for i, each in enumerate(made):
        path = folder / f"{i} é.png"
        picture((7, i)).save(path)
        each["image"] = path.as_uri() if i % 2 else f"file://{path}"
    task = entry(jsonl(write_rows(tmp_path / "data/rows.jsonl", made)))
    _, found, report = prepared(tmp_path, task)
    assert answers(found) == ALL and report["dropped"] == {}
    made[0]["image"] = "file:///etc/hostname"
    write_rows(tmp_path / "data/rows.jsonl", made)
    with pytest.raises(DataError, match="1 path outside its root"):
        prepared(tmp_path, task, "outside")


BROKEN = {
    "cut": lambda i: spelled(i)[: len(spelled(i)) // 2],
    "no base64": lambda i: f"data:image/png;base64,{'%' * 4000}",
    "no picture": lambda i: "data:text/plain;base64," + base64.b64encode(b"x" * 9000).decode(),
    "no comma": lambda i: "data:" + "x" * 9000,
    "a long name": lambda i: "x" * 9000,
    "an address": lambda i: f"https://example.org/{i}.png",
    "of a bucket": lambda i: f"s3://bucket/{'deep/' * 500}{i}.png",
    "of a file": lambda i: f"file://elsewhere/{i}.png",
    "numbers": lambda i: [[i] * 900] * 9,
    "a number": lambda i: i + 1,
    "an object": lambda i: {"height": 3, "width": 4},
}


@pytest.mark.parametrize("form", BROKEN)
def test_what_is_no_picture_is_said_on_one_screen(tmp_path, form):
    (tmp_path / "data").mkdir()
    made = [row(i, image=BROKEN[form](i)) for i in range(COUNT)]
    path = write_rows(tmp_path / "data/rows.jsonl", made)
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, entry(jsonl(path)))
    told = str(caught.value)
    assert len(told) < SCREEN and "\n" not in told
    if form in ("an address", "of a bucket", "of a file"):
        assert "pictures are not fetched" in told and "image_root" in told


def test_no_explanation_is_longer_than_a_screen():
    """However many reasons there are, and however long what they show."""
    rng = random.Random(0)
    for _ in range(50):
        stats = DropStats()
        for _ in range(rng.randint(1, 60)):
            reason = f"no field {'x' * rng.choice((3, 30, 3000))}{rng.randrange(30)}"
            stats.drop(reason, "w" * rng.choice((5, 5000)), "d" * rng.choice((5, 100_000)))
        assert len(stats.explain()) < SCREEN + 500 and str(stats.total)
        assert len(json.dumps(stats.as_json())) < 400_000


# ---------------------------------------------------------------- less for all


@pytest.mark.parametrize("names", [("Train", "VAL", "Test"), ("Training", "dev", "testing")])
def test_folders_of_splits_are_no_classes_however_they_are_spelled(tmp_path, names):
    base = tmp_path / "pets"
    for i in range(COUNT):
        folder = base / names[i % 3] / ["cat", "dog"][i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture((5, i)).save(folder / f"{i}.png")
    task = entry({"source": "folder", "path": str(base)}, prompt="Which?", answer="{label}")
    _, found, report = prepared(tmp_path, task)
    assert report["splits"] == dict.fromkeys(SPLITS, 6) and answers(found) == {"cat", "dog"}
    (base / "validation").mkdir()
    with pytest.raises(DataError, match=f"{names[1]} and validation .* both stand for valid"):
        prepared(tmp_path, task, "twice")


@pytest.mark.parametrize("suffix", [".TXT", ".JSON", ".gt.txt", ".caption", ".xml"])
def test_what_stands_beside_pictures_is_read_or_named(tmp_path, suffix):
    base = tmp_path / "lines"
    base.mkdir()
    for i in range(COUNT):
        picture((5, i)).save(base / f"{i}.png")
        text = f"it is {i}"
        written = json.dumps({"answer": text}) if suffix == ".JSON" else text
        (base / f"{i}{suffix}").write_text(written)
    task = entry({"source": "folder", "path": str(base)}, prompt="Read.")
    if suffix.isupper():
        assert answers(prepared(tmp_path, task)[1]) == ALL
        return
    with pytest.raises(DataError, match=rf"0{suffix} is not read, write .* into 0\.json"):
        prepared(tmp_path, task)


SEVERAL_COLUMNS = {
    "before_file_name": ("before_file_name", "after_file_name"),
    "image": ("image", "images"),
    "file_name": ("file_name", "mask_file_name"),
}


@pytest.mark.parametrize("first", SEVERAL_COLUMNS)
def test_pictures_in_two_columns_are_asked_about(tmp_path, data, first):
    one, other = SEVERAL_COLUMNS[first]
    made = [
        {"prompt": "?", "answer": f"it is {i}", one: f"{i}.png", other: [f"{i ^ 1}.png"]}
        for i in range(COUNT)
    ]
    path = write_rows(data / "rows.jsonl", made)
    with pytest.raises(DataError, match=f"columns {one} and {other} both have pictures"):
        prepared(tmp_path, entry(jsonl(path)))
    _, found, _ = prepared(tmp_path, entry(jsonl(path, image_field=other)), "said")
    assert answers(found) == ALL
    for each in made:
        each[other] = each[one]
    write_rows(path, made)
    assert answers(prepared(tmp_path, entry(jsonl(path)), "same")[1]) == ALL


PARTS = {
    "of transformers": lambda i: {"type": "image", "path": f"{i}.png"},
    "by address": lambda i: {"type": "image", "url": f"{i}.png"},
    "as base64": lambda i: {"type": "image", "base64": spelled(i)},
    "of Anthropic": lambda i: {"type": "image", "source": {"type": "base64", "data": spelled(i)}},
}


@pytest.mark.parametrize("style", PARTS)
def test_pictures_in_the_parts_of_a_chat_are_read(tmp_path, data, style):
    made = []
    for i in range(COUNT):
        asked = [PARTS[style](i), {"type": "text", "text": "What is it?"}]
        said = {"role": "assistant", "content": f"it is {i}"}
        made.append({"messages": [{"role": "user", "content": asked}, said]})
    path = write_rows(data / "rows.jsonl", made)
    metrics, found, _ = prepared(tmp_path, entry(jsonl(path, pictures="some")))
    assert answers(found) == ALL and metrics["pictures"] == COUNT


@pytest.mark.parametrize("turns", ["first", "each"])
def test_a_later_question_with_a_picture_of_its_own_costs_the_row(tmp_path, data, turns):
    made = []
    for i in range(COUNT):
        turn = [("human", "<image>\nWhat?"), ("gpt", f"it is {i}")]
        turn += [("human", "And <image>?" if i == 0 else "Sure?"), ("gpt", "yes")]
        chat = [{"from": who, "value": text} for who, text in turn]
        pictures = [f"{i}.png", "17.png"] if i == 0 else [f"{i}.png"]
        made.append({"images": pictures, "conversations": chat})
    path = write_rows(data / "rows.jsonl", made)
    report = prepared(tmp_path, entry(jsonl(path, turns=turns, max_bad_share=0.1)))[2]
    assert report["dropped"] == {"pictures in later turns": 1}
    assert "question 2" in report["examples"]["pictures in later turns"][0]


SPELLED_PATHS = {
    "of Windows": "..\\data\\{}.png",
    "with a drive": "C:\\sets\\data\\{}.png",
    "of another machine": "/mnt/sets/data/{}.png",
    "with a folder too many": "data/{}.png",
    "escaped": "%2E/{}.png",
    "with a query": "{}.png?size=l",
    "with blanks": " {}.png",
    "in capitals": "{}.PNG",
}


@pytest.mark.parametrize("spelling", SPELLED_PATHS)
def test_a_path_of_another_machine_is_told_by_what_is_there(tmp_path, data, spelling):
    made = [row(i, image=SPELLED_PATHS[spelling].format(i)) for i in range(COUNT)]
    path = write_rows(data / "rows.jsonl", made)
    wanted = "image_root" if spelling == "of another machine" else r"0\.png does: "
    with pytest.raises(DataError, match=wanted):
        prepared(tmp_path, entry(jsonl(path)))
