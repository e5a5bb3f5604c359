import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.places import KeyPath, Places, shown

INTRICATE = '''\
# [not.a.table]
top = "a = 1" # b = 2
"quoted key".'x.y' . bare = \'\'\'
[no] = table
\'\'\'
multi = """
\\"""
fake = 1
""""
[a]
list = [ # comment ]
  "one", 'tw]o', # three
  [4, {five = 5, "six" = [
    6]}],
]
when = 1979-05-27 07:32:00
[a . "b.c"]
k.l = { m = { n = "}" }, o = 1.5e3 }
empty = []
nothing = {}
[[t]]
x = 1
[[t]]
x = 2
[t.u]
y = true
[[t.v]]
z = 1
[ "ünï" ]
'''


def flat(value: Any, path: KeyPath = ()) -> set[KeyPath]:
    found = {path} if path else set()
    pairs: Any = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    for key, each in pairs:
        found |= flat(each, (*path, key))
    return found


def test_everything_that_tomllib_finds_has_a_line() -> None:
    places = Places(INTRICATE)
    assert places.paths() == flat(tomllib.loads(INTRICATE))


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("top",), 2),
        (("quoted key", "x.y", "bare"), 3),
        (("multi",), 6),
        (("a",), 10),
        (("a", "list"), 11),
        (("a", "list", 1), 12),
        (("a", "list", 2, 1, "six", 0), 14),
        (("a", "when"), 16),
        (("a", "b.c", "k", "l", "m", "n"), 18),
        (("a", "b.c", "empty", 7), 19),
        (("t",), 21),
        (("t", 1, "x"), 24),
        (("t", 1, "u", "y"), 26),
        (("t", 1, "v", 0, "z"), 28),
        (("ünï", "absent"), 29),
        (("absent",), 1),
        ((), 1),
    ],
)
def test_lines(path: KeyPath, line: int) -> None:
    assert Places(INTRICATE).line(path) == line
    assert Places(INTRICATE.replace("\n", "\r\n")).line(path) == line


def test_keys_as_they_are_shown() -> None:
    assert shown(("vm", "web01", "exclude_disks", 0)) == "vm.web01.exclude_disks"
    assert shown(("vm", "web01.example", "a b")) == 'vm."web01.example"."a b"'


def test_text_that_is_no_toml_does_not_hang() -> None:
    with pytest.raises(ValueError, match="unexpected text at offset 0"):
        Places("= 1")


KEYS = st.sampled_from(["a", "b-1", '"c.d"', "'e \"f'", '"\\u00e9"', "x . y"])
VALUES = st.recursive(
    st.sampled_from(["1", "true", '"]"', "'}'", '"""\n[x]\n"""', "1979-05-27", '"\\"#"', "nan"]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: "[ # ]\n" + ",\n".join(items) + "\n]")
        | st.dictionaries(st.sampled_from(["p", '"q r"', "s.t"]), inner, max_size=3).map(
            lambda pairs: "{" + ", ".join(f"{key} = {each}" for key, each in pairs.items()) + "}"
        )
    ),
    max_leaves=6,
)
TABLES = st.dictionaries(
    st.sampled_from(["t1", "t2.u", '"t3.x"', " t4 . 'v w' "]),
    st.dictionaries(KEYS, VALUES, max_size=4),
    max_size=3,
)


@given(TABLES)
def test_any_file_is_followed(tables: dict[str, dict[str, str]]) -> None:
    lines: list[str] = []
    for name, pairs in tables.items():
        lines.append(f"[{name}] # = [")
        lines += [f"{key} = {value} # end" for key, value in pairs.items()]
    text = "\n".join(lines)
    assert Places(text).paths() == flat(tomllib.loads(text))
