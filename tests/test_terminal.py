"""`generate` and `chat` over an engine without a model: colours, plain text, JSON, turns, Ctrl-C;
and once over a bundle."""

import io
import json
import os
import re
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from fake_engine import EXPERTS, SAID, TEMPLATE, FakeEngine, routed_by_request
from PIL import Image
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import interrupts
from pipeline.__main__ import main
from pipeline.errors import DataError
from pipeline.run import speak_flags
from pipeline.run.arguments import parser
from pipeline.serve.generation import NoSuchReader, Piece, Sampling, Token
from pipeline.serve.prompts import TextPrompts
from pipeline.serve.terminal import bundle as terminal_bundle
from pipeline.serve.terminal.bundle import OpenBundle
from pipeline.serve.terminal.conversation import Conversation, chat, typed
from pipeline.serve.terminal.drawing import Coloured, Plain, TokenLines, drawing
from pipeline.serve.terminal.one_text import Asked, generate
from pipeline.serve.terminal.speaking import printable, runs, styles

SPEAKERS = (*EXPERTS, "base")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle's folder, as far as its prompts read it."""
    made = tmp_path_factory.mktemp("bundle")
    for name, text in FakeEngine().tokenizer.stock_files([]).items():
        (made / name).write_text(text)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


def opened(folder, engine=None, **asked) -> OpenBundle:
    """Open a bundle whose engine says SAID."""
    engine = engine or FakeEngine()
    return OpenBundle(engine, TextPrompts(engine, folder), asked)


def terminal(**options) -> Console:
    """Return a terminal with colours."""
    return Console(
        file=io.StringIO(), force_terminal=True, color_system="standard", width=100, **options
    )


def drawn_on(console, **options):
    """Return how texts are shown there."""
    options = {"experts": False, "as_json": False} | options
    return drawing(console, SPEAKERS, **options)


def generated(folder, console, *, engine=None, asked=None, readers=("stack",), **options) -> str:
    """Return what `generate` writes to a console."""
    bundle = opened(folder, engine, **(asked or {}))
    generate(bundle, Asked("The", (), readers), drawn_on(console, **options))
    return console.file.getvalue()


def by_turns(engine: FakeEngine) -> FakeEngine:
    """Have one token spoken by the first expert and the next by the second."""
    count = iter(range(10_000))
    plain = engine._token

    def spoken(number, text) -> Token:
        first = next(count) % 2
        return replace(plain(number, text), experts=[[first], [first]])

    engine._token = spoken
    return engine


def test_a_terminal_has_each_token_in_its_experts_colour_and_a_legend(folder):
    text = generated(folder, terminal(), engine=by_turns(FakeEngine()))
    body, legend = text.split("\n", 1)
    assert COLOURS.sub("", body) == SAID
    pieces = re.findall(r"\x1b\[(\d+)m([^\x1b]*)\x1b\[0m", body)
    # cyan and yellow by turns
    assert [code for code, _ in pieces] == ["36", "33"] * (len(pieces) // 2) + ["36"] * (
        len(pieces) % 2
    )
    assert re.fullmatch(r"■ sea 5\d %  ■ shop (4|5)\d %\n", COLOURS.sub("", legend))
    assert "\x1b[36m■" in legend and "\x1b[33m■" in legend


@pytest.mark.parametrize("options", [{"no_color": True}, {"color_system": None}])
def test_without_colours_there_is_the_text_alone(folder, options):
    assert generated(folder, Console(file=io.StringIO())) == f"{SAID}\n"
    plain = Console(file=io.StringIO(), **({"force_terminal": True, "width": 80} | options))
    assert generated(folder, plain) == f"{SAID}\n"


def test_experts_can_be_told_as_tables(folder):
    console = Console(file=io.StringIO(), width=200)
    text = generated(folder, console, engine=by_turns(FakeEngine()), experts=True)
    first, tables = text.split("\n", 1)
    assert first == SAID
    spoken, parts = tables.split("shares")
    tokens = re.findall(r"│ (sea|shop) +│ +1 │", spoken)
    assert tokens[:4] == ["sea", "shop", "sea", "shop"]
    assert len(tokens) == len(FakeEngine().encode(SAID))
    assert re.search(r"│ shop +│ +\d+\.\d % │ +\d+\.\d % │", parts)


def test_lines_of_json_hold_every_token_and_the_end(folder):
    text = generated(folder, Console(file=io.StringIO()), as_json=True, readers=("stack", "shop"))
    lines = [json.loads(line) for line in text.splitlines()]
    of_stack = [line for line in lines if line["reader"] == "stack"]
    *tokens, end = of_stack
    assert "".join(token["text"] for token in tokens) == SAID
    assert tokens[0]["expert"] == "sea" and tokens[0]["experts"] == [["sea"], ["shop"]]
    assert tokens[0]["weights"] == [[1.0], [1.0]]
    assert end["finish"] == "stop" and end["completion_tokens"] == len(tokens)
    assert end["shares"]["sea"] == {"share": 0.5, "weight": 0.5}
    assert [line["reader"] for line in lines if "finish" in line] == ["stack", "shop"]
    assert text.isascii()


def test_several_readers_have_one_seed_and_are_asked_one_after_another(folder):
    engine = FakeEngine()
    console = Console(file=io.StringIO())
    text = generated(folder, console, engine=engine, readers=("stack", "shop", "base"))
    assert text == "".join(f"== {name} ==\n{SAID}\n" for name in ("stack", "shop", "base"))
    asked = [generation for generation, _ in engine.asked]
    assert [each.prompt.reader for each in asked] == [None, "shop", "base"]
    assert len({each.sampling.seed for each in asked}) == 1
    assert asked[0].sampling.seed is not None
    # typed, or not drawn at all
    generated(folder, console, engine=engine, readers=("stack", "shop"), asked={"seed": 5})
    generated(folder, console, engine=engine, readers=("stack", "shop"), asked={"temperature": 0})
    assert [each.sampling.seed for each, _ in engine.asked[3:]] == [5, 5, None, None]


def test_an_expert_called_stack_is_asked_for_as_the_api_names_it(folder):
    engine = FakeEngine()
    engine.readers = ("stack", "shop")
    console = Console(file=io.StringIO())
    generated(folder, console, engine=engine, readers=("stack", "expert:stack", "shop"))
    assert [each.prompt.reader for each, _ in engine.asked] == [None, "stack", "shop"]


def test_nothing_is_shown_before_all_readers_are_known(folder):
    console = Console(file=io.StringIO())
    with pytest.raises(NoSuchReader, match=r"there is no 'moon'; there are stack, sea, shop, base"):
        generated(folder, console, readers=("sea", "moon"))
    assert console.file.getvalue() == ""


def test_whom_a_router_chose_for_the_whole_text_is_told(folder):
    engine = FakeEngine()
    routed_by_request(engine)
    text = COLOURS.sub("", generated(folder, terminal(), engine=engine))
    assert "sea answers; the router is 75 % sure of sea; then shop 25 %" in text


def test_what_a_text_says_commands_no_terminal(folder):
    piece = Piece(Token(1, "\x1b[31mred\x07\r\n", [[0]], [[1.0]]), "\x1b[31mred\x07\r\n")
    for console in (terminal(), terminal(no_color=True)):
        drawn = drawn_on(console)
        drawn.begin("stack", heading=False)
        drawn.add(piece)
        assert "?[31mred??\n" in COLOURS.sub("", console.file.getvalue())
        assert "\x1b[31mred" not in console.file.getvalue()
    # a file has it as it is
    console = Console(file=io.StringIO())
    drawn = drawn_on(console)
    drawn.begin("stack", heading=False)
    drawn.add(piece)
    assert console.file.getvalue() == piece.text
    assert printable("é\tü\n", "ascii") == "?\t?\n"


def test_kinds_of_output():
    assert isinstance(drawn_on(terminal()), Coloured)
    assert isinstance(drawn_on(terminal(no_color=True)), Plain)
    assert isinstance(drawn_on(Console(file=io.StringIO())), Plain)
    assert isinstance(drawn_on(terminal(), as_json=True), TokenLines)


def test_many_experts_are_told_apart_and_the_base_has_no_colour():
    names = [f"e{i}" for i in range(32)]
    found = styles([*names, "base"])
    assert len({found[name] for name in names}) == 32 and found["base"] == ""


def test_runs_put_together_are_the_text(folder):
    engine = FakeEngine()
    tokens = [engine._token(each, engine._text(each)) for each in engine.encode(SAID)]
    mixed = []
    for i, token in enumerate(tokens):
        mixed.append(replace(token, experts=[[i // 3 % 2], [i // 3 % 2]]))
    found = runs(mixed, SPEAKERS)
    assert "".join(run.text for run in found) == SAID
    assert {run.tokens for run in found[:-1]} == {3}


def test_a_dense_model_s_text_is_nobody_s(folder):
    engine = FakeEngine()
    plain = engine._token
    engine._token = lambda *one: replace(plain(*one), experts=[], weights=[])
    assert generated(folder, terminal(), engine=engine) == f"{SAID}\n"
    tables = generated(folder, Console(file=io.StringIO()), engine=engine, experts=True)
    assert "no expert" in tables
    lines = generated(folder, Console(file=io.StringIO()), engine=engine, as_json=True)
    *tokens, end = map(json.loads, lines.splitlines())
    assert {(each["expert"], *each["experts"]) for each in tokens} == {(None,)}
    assert end["shares"] == {}


def typed_line(line: str):
    """Return what the command line makes of a line."""
    return parser().parse_args(line.split())


def test_sampling_is_typed_in_the_words_of_requests():
    line = (
        "generate hello --bundle b --max-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 4 "
        "--min-p 0.1 --seed -7 --stop a --stop b --presence-penalty -1 --frequency-penalty 2 "
        "--logit-bias 5=-100 --logit-bias 6=1.5"
    )
    found = speak_flags.sampling(typed_line(line))
    assert Sampling(**found) == Sampling(
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        seed=-7,
        stop=("a", "b"),
        presence_penalty=-1.0,
        frequency_penalty=2.0,
        logit_bias={5: -100.0, 6: 1.5},
    )
    assert speak_flags.sampling(typed_line("chat --bundle b")) == {}


@pytest.mark.parametrize(
    "flags",
    [
        "--temperature nan",
        "--temperature 3",
        "--top-p 0",
        "--top-k -1",
        "--max-tokens 0",
        "--seed x",
        "--logit-bias 5",
        "--logit-bias 5=1e9",
        "--min-p 1.1",
        "--experts --json",
        "--expert a --compare b",
    ],
)
def test_what_no_request_could_have_is_refused(flags, capsys):
    with pytest.raises(SystemExit):
        typed_line(f"generate hello --bundle b {flags}")
    assert "error:" in capsys.readouterr().err


def test_where_nothing_is_typed_texts_go_on_as_their_bundle_has_it(folder):
    bundle = opened(folder)
    assert (bundle.sampling.temperature, bundle.sampling.max_tokens) == (1.0, 256)
    # never over the context
    prompt = bundle.prompt("The", (), "stack")
    asked = bundle.begin(prompt).sampling
    assert asked.max_tokens == bundle.engine.context_tokens - len(prompt.ids)
    with pytest.raises(DataError, match="no room for an answer"):
        bundle.prompt("The " * 300, (), "stack")
    with pytest.raises(DataError, match="reads no pictures"):
        bundle.prompt("The", (folder / "tokenizer.json",), "stack")


def talk(folder, lines, engine=None) -> tuple[FakeEngine, str, list[str]]:
    """Have a chat; return the engine, what was answered, and what else was said."""
    engine = engine or FakeEngine()
    console = Console(file=io.StringIO())
    said = []
    chat(opened(folder, engine), drawn_on(console), lines, said.append)
    return engine, console.file.getvalue(), said


def asked_texts(engine) -> list[str]:
    """Return what the model read, text by text."""
    read = engine.tokenizer.model.decode
    return [read(list(each.prompt.ids), skip_special_tokens=False) for each, _ in engine.asked]


def test_a_chat_has_all_its_turns_until_it_is_begun_anew(folder):
    engine, answered, said = talk(folder, ["hello", "", "there", "/reset", "user", "/quit", "no"])
    assert answered == f"{SAID}\n" * 3
    first, second, third = asked_texts(engine)
    assert first.count("<|im_start|>") == 2 and "hello" in first
    assert second.startswith(first) and SAID in second and "there" in second
    assert "hello" not in third and SAID not in third
    assert said == ["begun anew"]


def test_who_answers_can_be_changed(folder):
    lines = ["hello", "/expert shop", "hello", "/expert moon", "/expert", "/expert stack", "hello"]
    engine, _, said = talk(folder, lines)
    assert [each.prompt.reader for each, _ in engine.asked] == [None, "shop", None]
    assert said[0] == "shop answers from now on"
    assert said[1] == "there is no 'moon'; there are stack, sea, shop, base"
    assert said[2] == "shop answers; there are stack, sea, shop, base"


def test_lines_for_the_chat_itself(folder, tmp_path):
    lines = ["/what", "/image", f"/image {tmp_path}/none.png", "//quit"]
    engine, answered, said = talk(folder, lines)
    assert said[0].startswith("there is no /what") and "/reset" in said[0]
    assert "name a picture" in said[1] and "cannot be read" in said[2]
    # a question that begins with a stroke
    assert answered == f"{SAID}\n" and "/quit" in asked_texts(engine)[0]


def test_a_picture_that_cannot_be_shown_keeps_no_question_from_being_put(folder, tmp_path):
    """Where nobody reads pictures, and where a file is none."""
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    lines = [f"/image {tmp_path}/a.png", f"/image {tmp_path}/rows.csv", "there"]
    engine, answered, said = talk(folder, lines)
    assert f"{tmp_path}/a.png: fake is a language model and reads no pictures" in said[0]
    assert said[1].startswith(f"{tmp_path}/rows.csv: ") and "is no whole PNG" in said[1]
    assert answered == f"{SAID}\n" and len(engine.asked) == len(said) - 1 == 1


@pytest.mark.parametrize(
    "typed",
    [
        '"{}/a b.png"',
        "'{}/a b.png'",
        "{}/a\\ b.png",
        "{}/a b.png",
        "~/a\\ b.png",
        '"~/a b.png"',
        "~/a b.png",
        "{}/it's.png",
        '"{}/it\'s.png"',
        '{}/"q".png',
    ],
)
def test_pictures_are_named_as_in_a_shell(folder, tmp_path, monkeypatch, typed):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a b.png", "it's.png", '"q".png'):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    # Which nobody of this bundle looks at, once it has been read
    _, _, said = talk(folder, [f"/image {typed.format(tmp_path)}"])
    assert "is a language model and reads no pictures" in said[0], said
    assert said[0].startswith(f"{tmp_path}/")


def test_several_pictures_are_named_at_once_and_a_name_without_quotes_is_told_whole(
    folder, tmp_path, monkeypatch
):
    for name in ("a b.png", "c.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    monkeypatch.setattr(OpenBundle, "question", lambda *_: None)
    lines = [f"/image '{tmp_path}/a b.png' {tmp_path}/c.png", "/image no such.png", '/image "a']
    _, _, said = talk(folder, lines)
    assert said[0] == "pictures of the next question: 2"
    assert said[1].startswith("no such.png cannot be read")
    assert said[2].startswith('"a cannot be read')


def test_names_and_bytes_that_nothing_has_are_told_and_end_no_chat(folder):
    lines = ["/image ~nobody-has-this/a.png", "/image a\0b", "n\udcffo", "there"]
    engine, answered, said = talk(folder, lines)
    assert "cannot be read: there is no such home" in said[0]
    assert "cannot be read: embedded null byte" in said[1]
    assert said[2] == "the text is not UTF-8 behind its character 1; write it in UTF-8"
    assert answered == f"{SAID}\n" and len(engine.asked) == 1
    with pytest.raises(DataError, match="not UTF-8"):
        opened(folder).prompt("\udcff", (), None)


def test_a_question_over_the_context_is_told_and_is_no_turn(folder):
    engine, answered, said = talk(folder, ["hello " * 300, "there"])
    assert "no room for an answer" in said[0]
    assert answered == f"{SAID}\n" and "hello" not in asked_texts(engine)[0]


def test_a_bundle_without_a_template_has_no_chat(folder, tmp_path):
    for name, text in FakeEngine().tokenizer.stock_files([]).items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="fake has no chat template.*generate"):
        talk(tmp_path, ["hello"])


def interrupting(console) -> threading.Thread:
    """Send Ctrl-C to this process once something is shown on a console."""

    def send() -> None:
        while not console.file.getvalue():
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()
    return sender


def test_ctrl_c_ends_an_answer_and_a_second_one_the_chat(folder):
    """By real signals to this process, while an answer comes."""
    engine = FakeEngine(step_s=0.02)
    console = Console(file=io.StringIO())
    said = []
    bundle = opened(folder, engine)
    talked = Conversation(bundle, drawn_on(console), said.append)

    with interrupts.raised_once(lambda: None):
        sender = interrupting(console)
        assert talked.take("hello")
        sender.join()
        (generation, _) = engine.asked[0]
        assert generation.cancelled and said == ["stopped; Ctrl-C once more ends the chat"]
        # what it had said is its turn, and the next answer comes whole
        part = talked.turns[1].text
        assert part and SAID.startswith(part) and part != SAID
        talked.take("there")
        assert talked.turns[-1].text == SAID
        with pytest.raises(KeyboardInterrupt):
            _interrupted()


def _interrupted() -> None:
    """Get Ctrl-C, which the main thread hears of between two of its instructions."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)


def test_ctrl_c_in_a_text_gives_it_up(folder):
    engine = FakeEngine(step_s=0.02)
    console = Console(file=io.StringIO())

    sender = interrupting(console)
    with pytest.raises(KeyboardInterrupt), interrupts.raised_once(lambda: None):
        generated(folder, console, engine=engine)
    sender.join()
    assert engine.asked[0][0].cancelled
    text = console.file.getvalue()
    assert text.endswith("\n") and SAID.startswith(text.rstrip("\n"))


def test_an_engine_that_fails_ends_the_line_and_is_told(folder):
    engine = FakeEngine()
    engine.fails = RuntimeError("out of luck")
    console = Console(file=io.StringIO())
    with pytest.raises(RuntimeError, match="out of luck"):
        generated(folder, console, engine=engine)
    assert console.file.getvalue().endswith("\n")


def test_lines_come_from_a_file_too(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("hé\nthere".encode()), "utf-8"))
    assert list(typed("> ")) == ["hé", "there"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    with pytest.raises(DataError, match="standard input is no text"):
        list(typed("> "))


PROMPT = "3: tide reef"


def test_a_bundle_goes_on_in_a_terminal_as_transformers_has_it(bundled, capsys, monkeypatch):
    """Typed, and from another program by configuration and store, with who spoke each token."""
    path, store, folder = map(str, bundled)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    out_BT = model.generate(**prompt, do_sample=False, max_new_tokens=8)
    wanted = tokenizer.decode(out_BT[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
    greedy = ["--temperature", "0", "--max-tokens", "8"]
    assert main(["generate", PROMPT, "--bundle", folder, *greedy]) == 0
    assert capsys.readouterr().out == f"{wanted}\n"

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{PROMPT}\n".encode()), "utf-8"))
    asked = ["generate", "-", "--config", path, "--store", store, "--json", *greedy]
    assert main([*asked, "--compare", "stack", "shop"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    of_stack = [line for line in lines if line["reader"] == "stack"]
    assert "".join(line.get("text", "") for line in of_stack) == wanted
    for line in of_stack[:-1]:
        assert {line["expert"]} < {"sea", "shop", "hall"}
        assert [sum(layer) for layer in line["weights"]] == pytest.approx([1, 1], abs=1e-3)
    assert {line["expert"] for line in lines if line["reader"] == "shop" and "text" in line} == {
        "shop"
    }

    assert main(["generate", PROMPT, "--bundle", folder, "--expert", "moon"]) == 2
    assert re.search(r"there is no 'moon'; there are stack, sea, shop, hall", _flat(capsys))
    assert main(["chat", "--bundle", folder]) == 2
    assert "has no chat template" in _flat(capsys)


@pytest.mark.parametrize("command", [["generate", PROMPT], ["chat"]])
def test_products_run_in_what_is_typed_else_in_what_the_configuration_says(
    bundled, capsys, monkeypatch, command
):
    path, store, folder = map(str, bundled)
    asked = []

    def open_service(_folder, wanted):
        asked.append(wanted.dtype)
        raise DataError("seen")

    monkeypatch.setattr(terminal_bundle, "open_service", open_service)
    configured = [*command, "--config", path, "--store", store, "--override", "serve.dtype=bf16"]
    for line in (
        [*command, "--bundle", folder],
        [*command, "--bundle", folder, "--dtype", "auto"],
        configured,
        [*configured, "--dtype", "fp32"],
    ):
        assert main(line) == 2
        assert "seen" in _flat(capsys)
    assert asked == ["fp32", "auto", "bf16", "fp32"]


def _flat(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())
