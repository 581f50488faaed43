"""The command line as such: wrong usage, errors of every kind, help, start-up, what scripts may rely on everywhere."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import qemu
from support.cli import COMMAND, COMMANDS, dirtmap, error_of, json_of

import dirtmap.engine as dm
from dirtmap.fmt.errors import printable
from dirtmap.fmt.geometry import MAX_DISK_SIZE
from dirtmap.tools import cli
from dirtmap.tools.cli import main
from dirtmap.tools.sizes import human_share, human_size, parse_size

MIB = 1 << 20
UNITS = {suffix: 1024**power for power, suffix in enumerate("KMGTP", 1)}
SUFFIXES = {"": 1, **UNITS, "k": 1024, **{f"{suffix}iB": factor for suffix, factor in UNITS.items()}}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu.create(path, 4 * MIB)
    qemu.qemu_img("bitmap", "--add", path, "b0")
    return path


def process(*arguments: str | Path | bytes, **settings: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([COMMAND, *arguments], check=False, timeout=60, **settings)  # type: ignore[call-overload]


# Usage.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command. See dirtmap --help."),
        (["nonsense"], "No such command 'nonsense'."),
        (["dump"], "dump: Missing argument 'FILE'."),
        (["list", "--nonsense", "x"], "list: No such option"),
        (["list", "--output=xml", "x"], "list: Invalid value for '--output': 'xml' is not one of 'human', 'json'."),
        (["map", "x"], "map: Missing argument 'BITMAP'."),
        (["map", "--picture", "--totals", "x", "b"], "map: --picture goes with neither --totals"),
        (["add", "x", "b", "-g", "3.5K"], "add: Invalid value for '-g' / '--granularity': '3.5K' is not a size"),
        (["mark", "x", "b", "0"], "mark: Missing OFFSET and LENGTH"),
        (["mark", "x", "b", "0", "1", "--from", "y"], "mark: OFFSET and LENGTH do not go with --from."),
        (
            ["mark", "x", "b", "0", "9223372036854775808"],
            "mark: Invalid value for '[LENGTH]': '9223372036854775808' is",
        ),
        (["merge", "x", "b"], "merge: Missing argument 'SOURCE...'."),
        (["check", "-r", "some", "x"], "check: Invalid value for '-r' / '--repair'"),
        (["check", "-U", "-r", "all", "x"], "check: -U goes with reading only, not with -r."),
        (["completion", "tcsh"], "completion: Invalid value for '{bash|zsh|fish}'"),
        (["list", "-f", "vmdk", "x"], "list: Invalid value for '-f' / '--format'"),
    ],
)
def test_wrong_usage_is_one_line_and_status_1(arguments: list[str], message: str) -> None:
    assert error_of(*arguments).startswith(message)


def test_every_command_explains_itself() -> None:
    overview = dirtmap("--help").out
    for command in COMMANDS:
        help_text = dirtmap(command, "--help").out
        head, _, examples = help_text.partition("\nExamples:\n")
        first_line = head.splitlines()[2].strip()
        assert first_line in overview  # whole, not cut short
        assert len(head.split("\n\n")) >= 3  # usage, one line, a paragraph, options
        assert examples.startswith("  ")
        assert f"dirtmap {command}" in examples
        assert "\b" not in help_text


def test_the_overview_has_every_command_once_and_whole_lines() -> None:
    overview = dirtmap("--help").out.partition("\nExamples:\n")[0]
    named = re.findall(r"^  ([a-z]+) {2,}(.*)$", overview, re.MULTILINE)
    assert [name for name, _ in named] == list(main.list_commands(click.Context(main)))
    assert all(line.endswith(".") and not line.endswith("...") for _, line in named)
    headings = re.findall(r"^([A-Z].*):$", overview, re.MULTILINE)
    assert headings == ["Options", *cli._HEADINGS.values()]


def commands(group: click.Group, *before: str) -> Iterator[tuple[str, ...]]:
    """All commands of a group and of those in it, by the words that call them."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*before, name)
        if isinstance(command, click.Group):
            yield from commands(command, *before, name)


def shown(help_text: str) -> Iterator[list[str]]:
    """The arguments of each call of dirtmap in the examples of a help text, pipes and all."""
    text = ""
    for line in help_text.partition("\nExamples:\n")[2].splitlines():
        text += f"{line}\n"
        lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # a quote that the next line closes
            continue
        text = ""
        for is_operator, call in itertools.groupby(words, lambda word: set(word) <= set("|&;<>")):
            if not is_operator and (arguments := list(call))[0] == "dirtmap":
                yield arguments[1:]
    assert not text


@pytest.mark.parametrize("command", [(), *commands(main)], ids=" ".join)
def test_examples_of_the_help_are_right_usage(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    examples = list(shown(dirtmap(*command, "--help").out))
    groups = [words[:1] for words in commands(main) if len(words) > 1]
    assert any(arguments[: len(command)] == list(command) for arguments in examples) or command in groups
    monkeypatch.setattr(click.Command, "invoke", lambda *_: None)  # arguments are judged, and nothing is done
    for arguments in examples:
        dirtmap(*arguments)


def test_usage_is_pinned() -> None:
    usages = [dirtmap(command, "--help").out.splitlines()[0].removeprefix("Usage: dirtmap ") for command in COMMANDS]
    assert [usage.replace(" [OPTIONS]", "") for usage in usages] == [
        "list [TARGET]...",
        "dump FILE",
        "map TARGET [BITMAP]",
        "add TARGET BITMAP",
        "remove TARGET BITMAP",
        "clear TARGET BITMAP",
        "enable TARGET BITMAP",
        "disable TARGET BITMAP",
        "rename TARGET BITMAP NEW",
        "merge TARGET BITMAP SOURCE...",
        "copy TARGET BITMAP DEST_TARGET",
        "move TARGET BITMAP DEST_TARGET",
        "mark TARGET BITMAP [OFFSET] [LENGTH]",
        "recover TARGET [BITMAP]...",
        "check TARGET",
        "find BITMAP",
        "hold TARGET BITMAP COMMAND...",
        "serve TARGET [-- NBDKIT_ARGUMENT...]",
        "export TARGET...",
        "rebuild TARGET BITMAP",
        "plot TARGET [BITMAP]...",
        "transaction FILE",
        "sidecar RAW QCOW2",
        "completion {bash|zsh|fish}",
    ]


def test_version() -> None:
    assert dirtmap("--version").out.startswith("dirtmap 0.")


# Errors.


@pytest.mark.parametrize("command", ["list", "dump", "map", "recover", "check", "remove"])
def test_a_file_that_is_not_there(command: str, tmp_path: Path) -> None:
    missing = tmp_path / "missing.qcow2"
    bitmap = ["b"] if command in ("map", "remove") else []
    assert error_of(command, missing, *bitmap).startswith(f"{missing}: ")


def test_what_is_not_a_qcow2_image(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("hello")
    hint = "'node add' gives a raw one a name in a store"
    for command in (["list"], ["check"], ["add", "b"], ["map", "b"]):
        said = error_of(command[0], f"file:{path}", *command[1:])
        assert said == f"{path}: header.magic: not a qcow2 image; {hint}"
    assert error_of("list", "-f", "qcow2", path) == f"{path}: not of format qcow2"
    assert error_of("dump", "-f", "qcow2", path) == f"{path}: not of format qcow2"
    assert error_of("list", tmp_path).startswith(f"{tmp_path}: ")


def test_the_format_asked_for(image: Path) -> None:
    dirtmap("list", "-f", "qcow2", image)


@pytest.mark.parametrize("name", [b"new\nline\x1b[31m", b"\xff\xfe", "ж\u202e".encode(), b"it's"])
def test_odd_names_make_one_line_of_valid_utf8(name: bytes, image: Path) -> None:
    target = os.fsencode(image.parent) + b"/" + name + b".qcow2"
    for arguments in ([b"list", target], [b"map", os.fsencode(image), name]):
        done = process(*arguments, capture_output=True)
        assert done.returncode == 1
        assert done.stdout == b""
        said = done.stderr.decode("utf-8")
        assert said.removesuffix("\n").isprintable()
        assert said.endswith("\n")
    assert process(b"add", os.fsencode(image), name).returncode == 0
    assert name in [bitmap.encode("utf-8", "surrogateescape") for bitmap in dm.open(image)]
    for arguments in ([b"list"], [b"list", b"--output=json"], [b"dump"], [b"dump", b"--output=json"]):
        done = process(*arguments, os.fsencode(image), capture_output=True)
        assert done.returncode == 0
        assert "\x1b" not in done.stdout.decode("utf-8")


def test_printable() -> None:
    assert printable("disk.qcow2: ж") == "disk.qcow2: ж"
    assert printable("a\nb\x1b[0m\x7f\u2028\\") == "a\\nb\\x1b[0m\\x7f\\u2028\\"
    assert printable(b"\xff\xc3".decode("utf-8", "surrogateescape")) == "\\xff\\xc3"
    assert printable("\ud800") == "\\ud800"


@given(st.text(st.characters()))
def test_printable_is_one_line_that_can_be_encoded(text: str) -> None:
    assert len(printable(text).encode().decode().splitlines()) <= 1


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (MemoryError(), 1, "dirtmap: not enough memory\n"),
        (KeyboardInterrupt(), 130, "\n"),
        (OSError(28, "No space left on device"), 1, "dirtmap: standard output: No space left on device\n"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
        (dm.StorageError("disk\n.qcow2", "read: \udcff"), 1, "dirtmap: disk\\n.qcow2: read: \\xff\n"),
        (RecursionError("deep"), 1, "dirtmap: a bug in test_cli.py, line "),
        (OverflowError("int\ntoo large"), 1, "dirtmap: a bug in test_cli.py, line "),
    ],
)
def test_no_traceback_ever(raised: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from dirtmap.tools.cli import main

    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(dm.Host, "dump", fail)
    result = CliRunner().invoke(main, ["dump", "x"])
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == status
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == min(len(said), 1)


def test_full_disk_and_closed_pipe(image: Path) -> None:
    for command in ("list", "check", "dump"):
        with open("/dev/full", "wb") as full:
            done = process(command, image, stdout=full, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (1, b"dirtmap: standard output: No space left on device\n")
    with subprocess.Popen([COMMAND, "list", image], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(timeout=60) == 1


def test_closed_standard_streams_do_not_become_the_image(image: Path) -> None:
    def bitmaps() -> list[str]:
        with dm.open(image) as opened:
            return list(opened)

    script = f'exec "{COMMAND}" "$@" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", script, "sh", "add", image, "b1"], check=False, timeout=60).returncode == 0
    assert subprocess.run(["sh", "-c", script, "sh", "add", image, "b1"], check=False, timeout=60).returncode == 1
    assert bitmaps() == ["b0", "b1"]
    qemu.check(image)


def test_interrupt(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with subprocess.Popen([COMMAND, "transaction", path], stderr=subprocess.PIPE) as child:
        with open(path, "wb"):  # it has begun to read
            time.sleep(0.1)
            child.send_signal(signal.SIGINT)
            assert child.wait(timeout=60) == 130
        assert child.stderr is not None
        assert child.stderr.read().strip() == b""


@pytest.mark.parametrize("module", ["click", "dirtmap.tools.output", "dirtmap.tools.options"])
def test_an_interrupt_while_modules_are_imported(module: str, image: Path, tmp_path: Path) -> None:
    # An interrupt is raised wherever the main thread is: here, where that module is about to be looked for.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    done = process("list", image, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


# What holds everywhere.


@pytest.mark.parametrize("command", ["list", "dump", "map", "check", "recover"])
@pytest.mark.parametrize("output", ["human", "json"])
def test_quiet(command: str, output: str, image: Path) -> None:
    bitmap = ["b0"] if command == "map" else []
    done = dirtmap(command, "-q", f"--output={output}", image, *bitmap)
    assert (done.out, done.error) == ("", "")
    assert error_of(command, "-q", image.with_name("no.such"), *bitmap)


def test_no_colour_to_a_pipe(image: Path) -> None:
    qemu.qemu_io(image, "write 0 64k")
    for arguments in (["list"], ["dump"], ["check"], ["map", "--picture"], ["map"]):
        done = dirtmap(*arguments, image, *(["b0"] if "map" in arguments else []))
        assert "\x1b" not in done.out + done.error


def test_images_in_use(image: Path) -> None:
    before = image.read_bytes()
    with qemu.StorageDaemon(image):
        held = image.read_bytes()
        for arguments in (["list"], ["dump"], ["check"], ["map"]):
            bitmap = ["b0"] if arguments == ["map"] else []
            assert "open for writing by qemu-storage-da" in error_of(*arguments, image, *bitmap)
        for arguments in (["node", "add", "n", image], ["hold", image, "b0", "true"]):  # which take no -U
            assert error_of(*arguments).endswith("; commands that take -U read it all the same")
        assert json_of("list", "-U", image)[0]["bitmaps"][0]["flags"] == ["in-use", "auto"]
        dirtmap("dump", "-U", image)
        dirtmap("check", "-U", image)
        in_use = "inconsistent: in use by a writer, or left so by one that died; then recover or remove it"
        assert error_of("map", "-U", image, "b0") == f"{image}: bitmap 'b0': {in_use}"
        assert [finding["what"] for finding in json_of("check", "-U", image)["findings"]] == [in_use]
        for arguments in (
            ["add", image, "n"],
            ["remove", image, "b0"],
            ["recover", image],
            ["check", "-r", "all", image],
        ):
            assert "held by qemu-storage-da" in error_of(*arguments, "--wait", "0.2")
        assert image.read_bytes() == held
    assert before != held


# What takes longer to import than a command that touches no bits to do its work.
SLOW = {
    *("argparse", "asyncio", "concurrent.futures", "construct", "crc32c", "dirtmap.fmt.structures", "hashlib"),
    *("hypothesis", "importlib.metadata", "json", "logging", "multiprocessing", "numpy", "pdb", "pickle", "rich"),
    *("socket", "subprocess", "tempfile", "traceback", "zipfile"),
}


def imported(*arguments: str | Path) -> set[str]:
    """The modules that a command has imported when it ends, all going well."""
    run = "import sys\nfrom dirtmap.tools.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", run, *arguments], capture_output=True, check=False, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("where", ["image", "store"])
def test_commands_that_touch_no_bits_start_fast(image: Path, tmp_path: Path, where: str) -> None:
    """By what they leave out: neither numpy nor construct, nor anything else that takes long."""
    target: str | Path = image
    if where == "store":
        (tmp_path / "disk.raw").write_bytes(bytes(MIB))
        dirtmap("node", "add", "drive0", tmp_path / "disk.raw")
        dirtmap("add", "drive0", "b0")
        target = "drive0"
    commands: list[tuple[str | Path, ...]] = [
        ("list", target),
        ("disable", target, "b0"),
        ("enable", target, "b0"),
        ("add", target, "b1"),
        ("rename", target, "b1", "b2"),
        ("remove", target, "b2"),
        ("find", "b0"),
        ("node", "list"),
    ]
    if where == "image":
        assert imported("node", "add", "drive1", image) & SLOW == set()
        dirtmap("find", "b0")  # which makes the index: in a temporary folder
        commands += [("node", "rename", "--with-bitmaps", "drive1", "drive2"), ("check", image)]
    for arguments in commands:
        assert imported(*arguments) & SLOW == set(), arguments


def test_a_command_imports_no_other(image: Path) -> None:
    ours = {name for name in imported("list", image) if name.startswith("dirtmap.tools.")}
    assert ours == {f"dirtmap.tools.{name}" for name in ("cli", "exits", "list", "options", "output", "sizes", "times")}
    assert "json" in imported("list", "--output=json", image)


@pytest.mark.parametrize("how", [(), ("--dirty",), ("--totals",), ("--output=json",)])
@pytest.mark.parametrize("where", ["image", "store"])
def test_a_map_takes_the_kernels_and_no_numpy(image: Path, tmp_path: Path, where: str, how: tuple[str, ...]) -> None:
    target: str | Path = image
    if where == "store":
        (tmp_path / "disk.raw").write_bytes(bytes(MIB))
        dirtmap("node", "add", "drive0", tmp_path / "disk.raw")
        dirtmap("add", "drive0", "b0")
        dirtmap("mark", "drive0", "b0", "64K", "64K")
        target = "drive0"
    found = imported("map", *how, target, "b0")
    assert "dirtmap.engine.model._bits" in found
    assert found & SLOW == set()


def test_numpy_starts_no_threads(image: Path) -> None:
    """Where a command needs it; they would be for its linear algebra."""
    run = "import os, sys\nfrom dirtmap.tools.start import main\ntry: main()\nfinally:\n"
    run += " import numpy\n print(len(os.listdir('/proc/self/task')), file=sys.stderr)"
    words = [sys.executable, "-c", run, "list", str(image)]
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run(words, env=environment, capture_output=True, check=True, timeout=60)
    assert done.stderr == b"1\n"


@pytest.mark.parametrize("said", ["", "3"])
def test_what_spares_numpy_threads_is_not_passed_on(image: Path, said: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    if said:
        environment["OPENBLAS_NUM_THREADS"] = said
    words = [COMMAND, "export", str(image), "--run", 'echo "$OPENBLAS_NUM_THREADS"']
    done = subprocess.run(words, env=environment, capture_output=True, check=True, timeout=60)
    assert done.stdout.decode() == said + "\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str) -> None:
    assert "_DIRTMAP_COMPLETE" in dirtmap("completion", shell).out


def test_completion_of_names(image: Path) -> None:
    qemu.qemu_img("bitmap", "--add", image, "b1")

    def complete(*words: str) -> list[str]:
        environment = {"_DIRTMAP_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words)}
        environment["COMP_CWORD"] = str(len(words) - 1)
        done = process(env=os.environ | environment, capture_output=True)
        return [line.partition(",")[2] for line in done.stdout.decode().splitlines() if line]

    assert complete("dirtmap", "re") == ["remove", "rename", "rebuild", "recover"]
    assert complete("dirtmap", "map", str(image), "b") == ["b0", "b1"]
    assert complete("dirtmap", "map", "/no/such", "b") == []
    assert complete("dirtmap", "export", str(image), "--bitmap", "b") == ["b0", "b1"]


# Sizes.


@given(st.integers(0, MAX_DISK_SIZE), st.sampled_from(sorted(SUFFIXES)), st.integers(0, 40))
def test_sizes(number: int, suffix: str, zeros: int) -> None:
    text = "0" * zeros + str(number) + suffix
    if number * SUFFIXES[suffix] > MAX_DISK_SIZE:
        with pytest.raises(ValueError, match="more than 2"):
            parse_size(text)
    else:
        assert parse_size(text) == number * SUFFIXES[suffix]


@given(st.integers(0, MAX_DISK_SIZE))
def test_sizes_that_are_printed_are_read(number: int) -> None:
    assert parse_size(f"{number:#x}") == parse_size(f"0x000{number:X}") == number
    for factor in UNITS.values():
        text = human_size(number // factor * factor).replace(" ", "")
        if "." not in text and "E" not in text and text != f"{number}B":
            assert parse_size(text.removesuffix("B") if text[-2:-1].isdigit() else text) == number // factor * factor


@given(st.one_of(st.text(), st.from_regex(r"[-+ ]?(0x)?[\d_.]+(e\d)?[a-zA-Z]{0,3}\s?")))
def test_nothing_else_is_a_size(text: str) -> None:
    digits = next((text.removesuffix(unit) for unit in sorted(SUFFIXES, key=len)[::-1] if text.endswith(unit)), text)
    if digits and set(digits) <= set("0123456789"):
        return
    if text.startswith("0x") and text[2:] and set(text[2:]) <= set("0123456789abcdefABCDEF"):
        return
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "K",
        "3.5K",
        "1e9",
        "-1",
        "+1",
        " 1",
        "1 ",
        "1\n",
        "1_0",
        "0x",
        "0xg",
        "0x10K",
        "0X10",
        "x10",
        "\uff11",
        "\u0661",
        "1m",
        "1KB",
        "1kiB",
        "1KIB",
        "1 KiB",
        "1iB",
        "1E",
        "1EiB",
    ],
)
def test_sizes_that_users_might_try(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("text", [str(2**63), "8388608T", "8192P", "9" * 5000, "9" * 5000 + "P"])
def test_sizes_that_are_too_large(text: str) -> None:
    with pytest.raises(ValueError, match="more than 2"):
        parse_size(text)


def test_sizes_for_people() -> None:
    sizes = [0, 512, 1023, 1024, 1536, 10**10, MAX_DISK_SIZE]
    assert [human_size(size) for size in sizes] == ["0 B", "512 B", "1023 B", "1 KiB", "1.5 KiB", "9.3 GiB", "8.0 EiB"]
    shares = [(0, 0), (0, 5), (1, 10**6), (5, 10), (10, 10), (11, 10)]
    assert [human_share(*share) for share in shares] == ["", "0.0%", "<0.1%", "50.0%", "100.0%", "100.0%"]
