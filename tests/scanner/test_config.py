"""Settings from files: what they mean, and which line is blamed for what."""

import os
import pwd
import re
import tempfile
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sksm.errors import Misconfigured
from sksm.scanner import config, positions
from sksm.scanner.config import Config, load
from sksm.scanner.schema import address
from sksm.scanner.selection import Rule

pytestmark = [pytest.mark.check, pytest.mark.pure]

EVERYTHING = """
# All there is.
cpu_percent = 1.5
quiet_seconds = 10 # an integer, too
metrics = "localhost:9100"
log = 'json'

[[watch]]
name = "gunicorn*"
uid = "root"
cgroup = "/system.slice"

[[watch]]
qemu = true
domain = "guests"

[[exclude]]
unit = "nginx"
pid = 1
"""


@pytest.fixture
def write(tmp_path):
    """Give `write(text, name)`: the path of a file of settings that is ours."""

    def make(text, name="config.toml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(0o600)
        return path

    return make


@pytest.fixture
def complaint(write):
    """Give `complaint(text)`: the line that is blamed, and what is said of it."""

    def provoke(text):
        path = write(text)
        with pytest.raises(Misconfigured) as caught:
            load([path])
        message = str(caught.value)
        assert message.startswith(f"{path}:")
        line, _, what = message.removeprefix(f"{path}:").partition(": ")
        assert "\n" not in message
        return int(line), what

    return provoke


def test_without_files_there_are_the_defaults(tmp_path):
    """Also where the directory is missing, or a file in its place."""
    (tmp_path / "file").touch()
    nowhere = [tmp_path / "none" / "config.toml", tmp_path / "file" / "config.toml"]
    assert load(nowhere) == load([]) == Config()
    assert (Config().cpu_percent, Config().quiet_seconds) == (2.0, 2.0)


def test_every_setting_arrives(write):
    """Users are numbers then, and rules stay in order."""
    assert load([write(EVERYTHING)]) == Config(
        cpu_percent=1.5,
        quiet_seconds=10.0,
        metrics="localhost:9100",
        log="json",
        rules=(
            Rule(name="gunicorn*", uid=0, cgroup="/system.slice"),
            Rule(qemu=True, domain="guests"),
        ),
        excluded=(Rule(unit="nginx", pid=1),),
    )


def test_a_later_file_replaces_what_it_names(write):
    """Rules as a whole; what it does not name stays."""
    system = write(EVERYTHING, "system.toml")
    own = write('cpu_percent = 3\n[[watch]]\nname = "mine"', "own.toml")
    first, both = load([system]), load([system, own])
    assert (both.cpu_percent, both.rules) == (3.0, (Rule(name="mine"),))
    assert (both.quiet_seconds, both.log) == (first.quiet_seconds, first.log)
    assert both.excluded == first.excluded


def test_who_names_no_rules_on_purpose_has_none(write):
    """An empty list is a value."""
    own = write("watch = []", "own.toml")
    assert load([write(EVERYTHING, "system.toml"), own]).rules == ()


@pytest.mark.parametrize(
    ("uid", "home", "own"),
    [
        (0, "/there", None),
        (1000, "/there", "/there/sksm/config.toml"),
        (1000, "", "/home/me/.config/sksm/config.toml"),
        (1000, "not/absolute", "/home/me/.config/sksm/config.toml"),
    ],
)
def test_users_have_a_file_of_their_own(monkeypatch, uid, home, own):
    """Root has none."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setenv("XDG_CONFIG_HOME", home)
    monkeypatch.setenv("HOME", "/home/me")
    expected = [Path("/etc/sksm/config.toml")] + ([Path(own)] if own else [])
    assert config.default_paths() == expected


def test_by_default_these_files_are_read(monkeypatch, write):
    """Whatever this machine has in /etc."""
    path = write("cpu_percent = 7")
    monkeypatch.setattr(config, "default_paths", lambda: [path])
    assert load().cpu_percent == 7.0


@pytest.mark.parametrize(
    ("setting", "right"),
    [
        ("cpu_percent = 0", "above 0"),
        ("cpu_percent = 100.5", "100 at most"),
        ("cpu_percent = nan", "above 0"),
        ("cpu_percent = true", "not true"),
        ('cpu_percent = "2"', "not '2'"),
        ("quiet_seconds = 0.5", "from 1"),
        ("quiet_seconds = inf", "to 250"),
        ("quiet_seconds = 2000-01-02", "not 2000-01-02"),
        ("metrics = 9100", "in quotes"),
        ('metrics = "70000"', "HOST:PORT"),
        ('log = "xml"', '"text" or "json"'),
        ("log = ['text']", '"text" or "json"'),
        ("log.format = 'text'", "not a table"),
        ('watch = "all"', "under a line [[watch]]"),
        ("exclude = [1]", "under a line [[exclude]]"),
    ],
)
def test_a_wrong_value_is_told_with_what_is_right(complaint, setting, right):
    """By its line, its name, and what it takes."""
    line, what = complaint(f"# one\n\n{setting}\n# four\n")
    assert line == 3
    assert what.startswith(setting.partition(" ")[0].partition(".")[0] + " takes ")
    assert right in what


@pytest.mark.parametrize("kind", ["watch", "exclude"])
@pytest.mark.parametrize(
    ("criterion", "right"),
    [
        ("pid = 0", "from 1 to"),
        ("pid = 4194305", "to 4194304"),
        ('name = ""', "a pattern"),
        ("name = {a = 1}", "a pattern"),
        ("uid = -1", "number of a user"),
        ("uid = 4294967295", "number of a user"),
        (f"uid = {10**30}", "number of a user"),
        ("uid = 1.0", "number of a user"),
        ('cgroup = "system.slice"', "/proc/PID/cgroup"),
        ('cgroup = "/sys/fs/cgroup/system.slice"', "/proc/PID/cgroup"),
        ("unit = 3", "systemd unit"),
        ('qemu = "yes"', "true or false"),
    ],
)
def test_a_wrong_criterion_is_told_with_what_is_right(
    complaint, kind, criterion, right
):
    """In the rule that has it, though others have the same key."""
    line, what = complaint(
        f'[[{kind}]]\nname = "a"\n[[{kind}]]\nname = "b"\n[[{kind}]]\n{criterion}\n'
        if not criterion.startswith("name")
        else f'[[{kind}]]\nname = "a"\n[[{kind}]]\npid = 3\n[[{kind}]]\n{criterion}\n'
    )
    assert line == 6
    assert what.startswith(criterion.partition(" ")[0] + " takes ")
    assert right in what


@pytest.mark.parametrize("domain", ["1000", "0-guarded", "a b", "", "a\\n", "-a"])
def test_a_domain_has_a_name_that_no_user_has(complaint, domain):
    """Numbers are the domains of users."""
    line, what = complaint(f'[[watch]]\nqemu = true\ndomain = "{domain}"')
    assert (line, "a letter first" in what) == (3, True)


def test_a_domain_is_no_matter_of_excluding(complaint):
    """It is told what there is instead."""
    line, what = complaint('[[exclude]]\nname = "a"\ndomain = "b"')
    assert line == 3
    assert what == (
        "'domain' is unknown in [[exclude]]: "
        "there are pid, name, uid, cgroup, unit, qemu"
    )


@pytest.mark.parametrize("rule", ["", "qemu = false", 'domain = "a"'])
def test_a_rule_without_criteria_is_a_mistake(complaint, rule):
    """It would mean everybody, which nobody means."""
    line, what = complaint(f'[[watch]]\nname = "a"\n\n[[watch]]\n{rule}\n')
    assert line == 4
    assert "at least one of pid, name" in what


@pytest.mark.parametrize(
    ("name", "right"),
    [("nobody-at-all", "getent passwd"), ("1000", "without quotes")],
)
def test_a_user_that_is_not_there_is_a_mistake(complaint, name, right):
    """A rule for nobody would be silent for ever."""
    line, what = complaint(f'[[watch]]\nname = "a"\nuid = "{name}"')
    assert line == 3
    assert f"no user has the name '{name}'" in what
    assert right in what
    assert complaint('[[watch]]\nuid = "\\u0000"')[0] == 2


def test_users_may_be_named(write):
    """By the name that the system has for them."""
    one = pwd.getpwall()[-1]
    found = load([write(f'[[watch]]\nuid = "{one.pw_name}"')])
    assert found.rules == (Rule(uid=pwd.getpwnam(one.pw_name).pw_uid),)


@pytest.mark.parametrize(
    ("text", "line", "right"),
    [
        ("\ncpu_precent = 1", 2, "cpu_percent may be meant"),
        ("\n'cpu_precent' = 1", 2, "cpu_percent may be meant"),
        ('[[watch]]\nnmae = "a"', 2, "name may be meant"),
        ('[[watch]]\nname = "a"\nlog = "json"', 3, "above the first line"),
        ("something = 1", 1, "there are cpu_percent, quiet_seconds"),
        ("\n[scanner]\nlog = 'json'", 2, "there are"),
        ("\n[watch.rule]\nname = 'a'", 2, "watch takes rules"),
        ("log = 'text'\n\n[watch]\nname = 'a'", 3, "[[watch]]"),
        ("watch = [\n {name = 'a'}, # }\n {nmae = 'b'},\n]", 3, "name may be meant"),
        ("watch = [{name = 'a'},\n\n {name = 'b',   unit = 1}]", 3, "unit takes"),
        ("watch = [\n {name = 'a'},\n {},\n]", 3, "at least one"),
        ("[[watch]]\nname = 'a'\n[watch.more]\nname = 'b'", 3, "'more' is unknown"),
        ("[[watch]]\nname = 'a'\nmore.name = 'b'", 3, "'more' is unknown"),
        ("[[watch]]\nname = '''\nunit = 1\n'''\nunit = 2", 5, "unit takes"),
        (
            "[[watch]]\nname = 'unit = 1' # unit = 1\n\"un\\u0069t\" = 2",
            3,
            "unit takes",
        ),
        ("[[watch]]\nname = 'a'\n[[exclude]]\nname = 1", 4, "name takes"),
        (
            "[[exclude]]\nname = 'a'\n[[watch]]\nname = 'b'\n[[exclude]]\nname = 1",
            6,
            "",
        ),
        ("quiet_seconds = 5\r\nlog = 'text'\r\n\r\ncpu_percent = 0\r\n", 4, "above 0"),
    ],
)
def test_the_line_is_that_of_the_key(complaint, text, line, right):
    """However the table is written, and whatever has the same name."""
    found, what = complaint(text)
    assert found == line
    assert right in what


@pytest.mark.parametrize(
    ("text", "line", "right"),
    [
        ("\nlog = json\n", 2, "text goes in quotes"),
        ("log = 'json'\n\nlog = 'text'", 3, "give each key once"),
        ("[watch]\nname = 'a'\n[watch]\nname = 'b'", 3, "[[watch]]"),
        ("log\n= 'json'", 1, "KEY = VALUE"),
        ("log", 1, "KEY = VALUE"),
        ("log = 'json' cpu_percent = 1", 1, "one KEY = VALUE on a line"),
        ("# one\n# two\nwatch = [\n", 3, "every bracket is closed"),
        ("log = 'json\n'", 1, "toml.io"),
        ("!", 1, "KEY = VALUE"),
        (b"# \xc3\xa4\n# \xe4\n", 2, "UTF-8"),
    ],
)
def test_what_is_no_toml_is_told_with_its_line(complaint, text, line, right):
    """And with what would be right, which tomllib does not tell."""
    found, what = complaint(text)
    assert found == line
    assert right in what


def test_a_number_beyond_all_measure_is_a_mistake(write):
    """Python refuses to read it, in words for programmers."""
    with pytest.raises(Misconfigured, match="thousands of digits"):
        load([write("cpu_percent = " + "1" * 5000)])


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_to_is_refused(write, mode):
    """With the command that mends it."""
    path = write("")
    path.chmod(mode)
    with pytest.raises(Misconfigured, match=f"chmod go-w {path}"):
        load([path])
    path.chmod(0o644)
    assert load([path]) == Config()


def test_a_file_of_somebody_else_is_refused(write, monkeypatch):
    """Root's are anybody's to trust, one's own, too."""
    path, owner = write(""), os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:
        assert load([path]) == Config()
        os.chown(path, 12345, -1)
    with pytest.raises(Misconfigured, match=f"chown {owner + 1} {path}"):
        load([path])


def test_what_is_no_file_is_refused(tmp_path):
    """At once: nobody waits at a pipe."""
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("directory", "pipe"):
        with pytest.raises(Misconfigured, match=f"{name} is no file"):
            load([tmp_path / name])


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ("9100", ("127.0.0.1", 9100)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("node-1.example.org:80", ("node-1.example.org", 80)),
    ],
)
def test_metrics_are_served_at_an_address(metrics, expected):
    """A port alone is not for other machines."""
    assert address(metrics) == expected


@pytest.mark.parametrize(
    "metrics",
    [
        *("0", "65536", "123456", "-1", "a", "localhost", "localhost:", ":80", "a:b"),
        *("::1:80", "[::1]", "[::g]:80", "[]:80", "300.1.1.1:80", "1.2.3:80"),
        *("a b:80", "http://a:80", "a:80/metrics", "٣٤", "80\n"),
    ],
)
def test_what_is_no_address_is_a_mistake(complaint, metrics):
    """Found when the file is read, not when somebody asks for metrics."""
    line, what = complaint("\nmetrics = " + quoted(metrics))
    assert line == 2
    assert "HOST:PORT" in what


def quoted(text):
    """Write a text as TOML does, anything but letters and digits escaped."""
    plain = (x if x.isascii() and x.isalnum() else f"\\U{ord(x):08X}" for x in text)
    return f'"{"".join(plain)}"'


CHARACTERS = st.characters(exclude_categories=["Cs"])
WORDS = st.text(CHARACTERS, max_size=6)
BARE = st.text("abcXYZ019-_", min_size=1, max_size=6)
CRITERIA = {"pid", "name", "uid", "cgroup", "unit", "qemu", "domain"}
SETTINGS = {"cpu_percent", "quiet_seconds", "engine", "metrics", "log"}
KNOWN = CRITERIA | SETTINGS | {"watch", "exclude"}


def starts(text):
    """List after how many lines of a text another statement may stand."""
    lines = text.splitlines(keepends=True)
    for count in range(len(lines) + 1):
        try:
            tomllib.loads("".join(lines[:count]))
        except tomllib.TOMLDecodeError:
            continue
        yield count


VALID = EVERYTHING + "[[watch]]\nname = '''\n[[watch]]\nnmae = 1\n'''\n\n"


@given(
    st.sampled_from([*starts(VALID)]),
    (BARE | WORDS).filter(lambda key: key not in KNOWN),
    st.sampled_from(["{} = 1", "{}.name = 1", "  {} . 'name' = 1 # {}", "[{}]"]),
    st.booleans(),
)
def test_an_unknown_key_is_told_by_its_line(at, key, form, bare):
    """Wherever it stands, however it is written, whatever it is called."""
    plain = bare and all(x in "abcXYZ019-_" for x in key) and key != ""
    statement = form.format(*[key if plain else quoted(key)] * 2)
    lines = VALID.splitlines()
    lines.insert(at, statement)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.toml"
        path.write_text("\n".join(lines))
        path.chmod(0o600)
        with pytest.raises(Misconfigured) as caught:
            load([path])
    assert str(caught.value).startswith(f"{path}:{at + 1}: {key!r} is unknown in ")


@st.composite
def values(draw, depth=2):
    """A TOML value: its text, and its paths with the lines where they stand."""
    if depth == 0 or draw(st.booleans()):
        texts = ["1.5e3", "true", "2000-01-02 03:04:05.5", "'#'", '"\\"]"', "''"]
        texts += ["''' [x]\n y = 1\n'''", "'''\n' # [\n'''", "'''x''''", "''''''"]
        texts += ['"""\n" # ]\n"""', '"""\n\\""" }"""""', '"""x""""', '""""""']
        return draw(st.sampled_from(texts)), {}
    elements = draw(st.lists(values(depth=depth - 1), max_size=3))
    spaces = draw(st.lists(st.sampled_from([" ", "\n", " # ,]\n"]), min_size=8))
    if draw(st.booleans()):
        return in_array(elements, spaces)
    return in_table(elements, draw(st.lists(st.text("ab.", max_size=2), min_size=3)))


def in_array(elements, spaces):
    text, lines = "[", {}
    for index, (value, inner) in enumerate(elements):
        text += spaces[2 * index]
        place(lines, (index,), text.count("\n"), inner)
        text += value + spaces[2 * index + 1] + ","
    return text + spaces[-1] + "]", lines


def in_table(elements, names):
    text, lines = "{", {}
    for index, (value, inner) in enumerate(elements):
        key = f"{names[index]}{index}"
        text += f"{', ' if index else ''}{quoted(key)} = "
        place(lines, (key,), text.count("\n"), inner)
        text += value
    return text + "}", lines


def place(lines, path, line, inner):
    lines[path] = line
    lines.update({(*path, *rest): line + more for rest, more in inner.items()})


@given(st.lists(st.tuples(st.sampled_from(["", "[{}]", "[[many]]"]), values())))
def test_every_key_is_found_on_its_line(statements):
    """Inside and behind values of any kind, tables and arrays of tables."""
    text, lines, table, many = "", {}, (), 0
    for number, (header, (value, inner)) in enumerate(statements):
        text += "# [no]\n"
        if header == "[[many]]":
            table, many = ("many", many), many + 1
            lines.setdefault(("many",), text.count("\n"))
            lines[table] = text.count("\n")
        elif header:
            table = (f"table {number}",)
            lines[table] = text.count("\n")
        text += header.format(f"'table {number}'") + f"\nkey{number} = "
        place(lines, (*table, f"key{number}"), text.count("\n"), inner)
        text += value + "\n"
    assert set(every_path(tomllib.loads(text))) == lines.keys()
    found = {path: positions.line_of(text, path) - 1 for path in lines}
    assert found == lines


def every_path(value, path=()):
    if isinstance(value, dict):
        inner = value.items()
    else:
        inner = enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*path, key)
        yield from every_path(one, (*path, key))


def test_what_stands_nowhere_is_looked_for_around_it():
    """A missing key is a mistake of its table."""
    text = "a = 1\n[[b]]\n[[b]]\nc.d = 1\n"
    assert positions.line_of(text, ("b", 1, "x", "y")) == 3
    assert positions.line_of(text, ("b", 1, "c", "d")) == 4
    assert positions.line_of(text, ("x",)) == 1


def test_the_examples_of_the_manual_are_right(write, monkeypatch):
    """And what it says the defaults are."""
    monkeypatch.setattr(pwd, "getpwnam", lambda _: pwd.getpwuid(0))
    manual = (Path(__file__).parents[2] / "docs/configuration.md").read_text()
    examples = re.findall(r"```toml\n(.*?)```", manual, re.DOTALL)
    assert len(examples) == 3
    guests, _, _ = (load([write(example)]) for example in examples)
    assert guests.rules == (Rule(qemu=True, domain="guests"),)
    assert guests.excluded == (Rule(unit=r"machine-qemu\x2d7\x2dsecret.scope"),)
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", manual, re.MULTILINE)
    told = "\n".join(f"{name} = {default}" for name, default in rows)
    assert tomllib.loads(told).keys() == SETTINGS
    assert load([write(told)]) == Config()
