"""What a restic repository consists of: made and read back, and each damage to it told, never stumbled over."""

import base64
import contextlib
import hashlib
import itertools
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.target.restic import (
    compression,
    config,
    crypto,
    envelope,
    fields,
    index_file,
    keys,
    lock_file,
    pack,
    snapshot,
    tree,
)
from orchestrator.target.restic.crypto import Cost, Key
from orchestrator.target.restic.errors import Damaged, OtherVersion, WrongPassword
from orchestrator.target.restic.lock_file import LockFile
from orchestrator.target.restic.pack import BlobKind, Entry, PackBuilder, open_blob, seal_blob
from orchestrator.target.restic.snapshot import ResticSnapshot
from orchestrator.target.restic.tree import FileContent, FileNode

KEY = Key(encrypt=bytes(range(32)), mac_k=bytes(range(32, 48)), mac_r=bytes(range(48, 64)))
NOON = datetime(2026, 11, 22, 12, 0, 0, 500_000, UTC)
CHEAP = Cost(2, 1, 1)
ORIGIN = keys.Origin(NOON, "root", "host1")
ids = st.binary(min_size=32, max_size=32)


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


# Sealing


def test_the_tag_is_that_of_the_paper_on_poly1305_aes() -> None:
    key = Key(
        encrypt=bytes(32),
        mac_k=bytes.fromhex("ec074c835580741701425b623235add6"),
        mac_r=bytes.fromhex("851fc40c3467ac0be05cc20404f3f700"),
    )
    nonce = bytes.fromhex("fb447350c4e868c52ac3275cf9d4327e")
    sealed = nonce + bytes.fromhex("f3f6") + bytes.fromhex("f4c633c3044fc145f84f335cb81953de")
    assert len(key.open(sealed, file="x")) == 2


@given(st.binary(max_size=1000))
def test_what_is_sealed_opens_and_is_never_the_same_twice(plain: bytes) -> None:
    sealed = KEY.seal(plain)
    assert len(sealed) == len(plain) + crypto.OVERHEAD_BYTES
    assert KEY.open(sealed, file="x") == plain
    assert KEY.seal(plain) != sealed


@given(st.binary(max_size=100), st.data())
def test_a_flipped_or_missing_bit_of_what_is_sealed_is_told(plain: bytes, data: st.DataObject) -> None:
    sealed = bytearray(KEY.seal(plain))
    at = data.draw(st.integers(0, len(sealed) * 8 - 1))
    with pytest.raises(Damaged, match="data/x"):
        KEY.open(sealed[: at // 8], file="data/x")
    sealed[at // 8] ^= 1 << at % 8
    with pytest.raises(Damaged, match="data/x"):
        KEY.open(sealed, file="data/x")


def test_another_key_does_not_open() -> None:
    with pytest.raises(Damaged):
        crypto.generate().open(KEY.seal(b"plain"), file="x")


def test_nothing_tells_a_key() -> None:
    secrets = {KEY.encrypt, KEY.mac_k, KEY.mac_r}
    told = [repr(KEY), str(KEY), f"{KEY}"]
    with pytest.raises(Damaged) as damaged:
        KEY.open(bytes(40), file="x")
    with pytest.raises(ValueError, match="32, 16 and 16") as wrong:
        Key(encrypt=b"secret", mac_k=b"", mac_r=b"")
    with pytest.raises(WrongPassword) as password:
        keys.unlock("hunter2", [_key_file("correct horse")])
    told += [str(error.value) + repr(error.value) for error in (damaged, wrong, password)]
    for text in told:
        assert not any(secret.hex() in text or repr(secret)[2:-1] in text for secret in secrets)
        assert not any(secret in text for secret in ("secret", "hunter2", "correct horse"))
    with pytest.raises(TypeError):
        __import__("pickle").dumps(KEY)


# Compression


@given(st.binary(max_size=2000), st.booleans(), st.booleans())
def test_any_way_of_framing_decompresses(plain: bytes, size: bool, checksum: bool) -> None:
    compressor = zstandard.ZstdCompressor(write_content_size=size, write_checksum=checksum)
    for compressed in (
        compressor.compress(plain),
        compressor.compress(plain[:7]) + compressor.compress(plain[7:]),
    ):
        if size and len(zstandard.ZstdCompressor().compress(plain)) != len(compressed) and len(plain) > 7:
            continue  # two frames that both say how long they are: restic makes none
        assert compression.decompress(compressed, length=len(plain), file="x") == plain


@pytest.mark.parametrize("size", [True, False])
def test_more_than_announced_is_not_decompressed(size: bool) -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=size).compress(bytes(100_000_000))
    for limit in (0, 1, 99_999_999):
        with pytest.raises(Damaged):
            compression.decompress_at_most(bomb, limit=limit, file="x")
    with pytest.raises(Damaged):
        compression.decompress(bomb, length=100_000_001, file="x")


def test_a_frame_that_announces_too_much_memory_is_damaged() -> None:
    frame = struct.pack("<IBBQ", zstandard.MAGIC_NUMBER, 0xC0, 0xFF, 2**63)
    with pytest.raises(Damaged):
        compression.decompress_at_most(frame, limit=1 << 30, file="x")


@given(st.binary(max_size=50))
def test_garbage_does_not_decompress(garbage: bytes) -> None:
    for compressed in (garbage, struct.pack("<I", zstandard.MAGIC_NUMBER) + garbage):
        try:
            compression.decompress_at_most(compressed, limit=1000, file="x")
        except Damaged:
            continue


# Keys


def _key_file(password: str, cost: Cost = CHEAP) -> tuple[str, bytes, bytes]:
    content = keys.make(password, KEY, ORIGIN, cost=cost)
    return "keys/1", sha256(content), content


def test_each_password_opens_its_own_key() -> None:
    files = [_key_file("one"), _key_file("two")]
    for number, password in enumerate(("one", "two")):
        identity, master = keys.unlock(password, files)
        assert identity == files[number][1]
        assert (master.encrypt, master.mac_k, master.mac_r) == (KEY.encrypt, KEY.mac_k, KEY.mac_r)
    with pytest.raises(WrongPassword) as wrong:
        keys.unlock("three", files)
    assert (wrong.value.code, wrong.value.exit_code) == ("wrong-password", 12)


def test_no_empty_password() -> None:
    with pytest.raises(ValueError, match="empty"):
        keys.make("", KEY, ORIGIN)


def test_a_damaged_key_file_is_told_unless_another_one_opens() -> None:
    good, bad = _key_file("one"), ("keys/bad", bytes(32), _key_file("two")[2])
    assert keys.unlock("one", [bad, good])[0] == good[1]
    with pytest.raises(Damaged, match="keys/bad"):
        keys.unlock("two", [bad, good])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("N", n) for n in (0, 1, 3, 1000, 2**31, -2, 2.0, True, None, "16384")),
        *(("r", r) for r in (0, 2**24, 2**32, -1)),
        *(("p", p) for p in (0, 2**26, -1)),
        ("kdf", "argon2id"),
        ("kdf", None),
        ("salt", base64.b64encode(bytes(32)).decode()),
        ("salt", "no base64"),
        ("salt", "ä"),
        ("data", 5),
        ("created", "yesterday"),
        ("created", "2026-11-22T12:00:00"),
    ],
)
def test_no_parameters_are_taken_on_trust(name: str, value: Any) -> None:
    document = json.loads(_key_file("one")[2]) | {name: value}
    content = json.dumps(document).encode()
    with pytest.raises(Damaged, match="keys/7"):
        keys.unlock("one", [("keys/7", sha256(content), content)])


def test_a_master_key_of_a_wrong_length_is_damage() -> None:
    parsed = keys.parse(_key_file("one")[2], file="keys/1")
    short = {"mac": {"k": "AAAA", "r": "AAAA"}, "encrypt": "AAAA"}
    user = crypto.derive("one", parsed.salt, parsed.cost)
    for document in (short, {}, [], {"mac": 5}):
        with pytest.raises(Damaged):
            keys.open_with("one", replace(parsed, data=user.seal(json.dumps(document).encode())))


def test_derive_refuses_what_is_too_expensive() -> None:
    assert Cost().problem() == ""
    assert Cost(2**20, 8, 1).problem() == ""
    with pytest.raises(ValueError, match="expensive"):
        crypto.derive("one", bytes(64), Cost(2**30, 8, 1))
    assert "expensive" in Cost(2**20, 8, 9).problem()
    assert "expensive" in Cost(2, 1, 2**26).problem()


# Config


def test_the_polynomial_is_irreducible() -> None:
    made = config.generate()
    assert config.open_sealed(config.seal(made, KEY), KEY) == made
    assert made.polynomial.bit_length() == 54
    assert config.generate().identity != made.identity


def test_irreducible_polynomials_of_small_degree_are_as_many_as_gauss_counted() -> None:
    counts = [sum(config.irreducible(p) for p in range(1 << n, 2 << n)) for n in range(2, 11)]
    assert counts == [1, 2, 3, 6, 9, 18, 30, 56, 99]


def test_restics_own_polynomials_are_irreducible() -> None:
    assert config.irreducible(0x3DA3358B4DC173)
    assert not config.irreducible(0x3DA3358B4DC171)


@pytest.mark.parametrize(
    "change",
    [
        {"version": "2"},
        {"id": "abc"},
        {"chunker_polynomial": "3da3358b4dc171"},
        {"chunker_polynomial": "25"},
        {"chunker_polynomial": "xyz"},
        {"chunker_polynomial": "-3da3358b4dc173"},
    ],
)
def test_a_config_that_is_none(change: dict[str, Any]) -> None:
    document = {"version": 2, "id": "ab" * 32, "chunker_polynomial": "3da3358b4dc173"}
    stored = partial(envelope.seal, KEY, compressed=False)
    assert config.open_sealed(stored(document), KEY).version == 2
    with pytest.raises(Damaged, match="config"):
        config.open_sealed(stored(document | change), KEY)


@pytest.mark.parametrize(
    ("version", "remedy"), [(1, "restic migrate upgrade_repo_v2"), (3, "a vmfleece that writes")]
)
def test_a_repository_in_another_version_of_the_format_is_not_called_damaged(version: int, remedy: str) -> None:
    document = {"version": version, "id": "ab" * 32, "chunker_polynomial": "3da3358b4dc173"}
    with pytest.raises(OtherVersion, match=f"in version {version} of restic's format") as refused:
        config.open_sealed(envelope.seal(KEY, document, compressed=False), KEY)
    assert remedy in refused.value.hint
    assert (refused.value.code, refused.value.retryable) == ("repository-version", False)


# Packs


def sealed(plain: bytes, kind: BlobKind = BlobKind.DATA) -> pack.SealedBlob:
    return seal_blob(kind, sha256(plain), plain, KEY)


blobs = st.lists(st.binary(max_size=300), min_size=1, max_size=8)


@given(blobs, st.sampled_from(BlobKind))
def test_a_pack_gives_back_what_went_in(plains: list[bytes], kind: BlobKind) -> None:
    builder = PackBuilder(kind, 100)
    for plain in plains:
        builder.add(sealed(plain, kind))
    made = builder.finish(KEY)
    assert made.identity == sha256(made.content)
    assert pack.list_pack(made.content, KEY, file="data/1") == made.entries
    for plain, entry in zip(plains, made.entries, strict=True):
        stored = bytes(made.content[entry.offset : entry.offset + entry.length])
        assert open_blob(stored, entry, KEY, file="data/1") == plain
        assert entry.content_bytes == len(plain)


def test_what_does_not_become_smaller_stays_raw_unless_it_is_a_tree() -> None:
    random, zeros = b"".join(sha256(bytes([n])) for n in range(32)), bytes(1024)
    assert sealed(random).plain_bytes is None
    assert sealed(zeros).plain_bytes == 1024
    assert sealed(random, BlobKind.TREE).plain_bytes == 1024


def test_a_pack_closes_at_its_size() -> None:
    builder = PackBuilder(BlobKind.DATA, 2000)
    while not builder.full:
        builder.add(sealed(sha256(b"x")))
    assert 2000 <= len(builder) < 2064


@given(blobs, st.data())
def test_a_flipped_byte_of_a_pack_is_told(plains: list[bytes], data: st.DataObject) -> None:
    builder = PackBuilder(BlobKind.DATA, 1)
    for plain in plains:
        builder.add(sealed(plain))
    made = builder.finish(KEY)
    content = bytearray(made.content)
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))

    def read_all() -> None:
        pack.list_pack(content, KEY, file="data/1")
        for entry in made.entries:
            open_blob(bytes(content[entry.offset : entry.offset + entry.length]), entry, KEY, file="data/1")

    with pytest.raises(Damaged, match="data/1"):
        read_all()
    with pytest.raises(Damaged, match="data/1"):
        pack.list_pack(made.content[:at], KEY, file="data/1")


@given(st.binary(max_size=200), st.integers(0, 500))
def test_any_bytes_as_a_header_are_a_list_or_damage(header: bytes, blobs_bytes: int) -> None:
    try:
        entries = pack.decode_header(header, blobs_bytes=blobs_bytes, file="data/1")
    except Damaged:
        return
    assert pack.encode_header(entries) == header


@pytest.mark.parametrize(
    "header",
    [
        b"",
        struct.pack("<BI32s", 0, 31, bytes(32)),
        struct.pack("<BI32s", 0, 99, bytes(32)),
        struct.pack("<BII32s", 2, 100, 0, bytes(32)),
        struct.pack("<BII32s", 2, 100, 2**32 - 1, bytes(32)),
        struct.pack("<BI32s", 4, 100, bytes(32)),
        struct.pack("<BI32s", 0, 100, bytes(32))[:-1],
    ],
)
def test_a_header_that_does_not_fit_its_pack(header: bytes) -> None:
    with pytest.raises(Damaged):
        pack.decode_header(header, blobs_bytes=100, file="data/1")


def test_a_blob_is_what_its_id_says() -> None:
    one = sealed(b"one")
    entry = Entry(BlobKind.DATA, sha256(b"two"), 0, len(one.sealed), one.plain_bytes)
    with pytest.raises(Damaged, match="not that of"):
        open_blob(one.sealed, entry, KEY, file="data/1")
    with pytest.raises(Damaged, match="are there"):
        open_blob(one.sealed[:-1], entry, KEY, file="data/1")


# Index files

entries = st.builds(
    Entry,
    st.sampled_from(BlobKind),
    ids,
    st.integers(0, 2**31),
    st.integers(32, 2**31 - 1),
    st.none() | st.integers(1, pack.LARGEST_BLOB_BYTES),
)


def listed(stored: bytes, wanted: list[bool] | None = None) -> list[tuple[bytes, list[Entry]]]:
    """What an index file lists, of some packs if `wanted` says which."""
    found = []
    for table in index_file.open_sealed(stored, KEY, file="index/1"):
        part = table if wanted is None else table.of(wanted)
        rows = zip(part.trees, part.identities, part.offsets, part.lengths, part.plain_bytes, strict=True)
        blobs = iter(
            [Entry(BlobKind.TREE if tree else BlobKind.DATA, *row[:3], row[3] or None) for tree, *row in rows]
        )
        for pack_id, count, end in zip(part.packs, part.counts, part.ends, strict=True):
            own = list(itertools.islice(blobs, count))
            assert end == max((entry.offset + entry.length for entry in own), default=0)
            found.append((pack_id, own))
    return found


@given(st.lists(st.tuples(ids, st.lists(entries, max_size=4)), max_size=4))
def test_an_index_file_lists_what_it_was_given(packs: list[tuple[bytes, list[Entry]]]) -> None:
    assert listed(index_file.seal(packs, KEY)) == packs


@given(st.lists(st.tuples(ids, st.lists(entries, max_size=4)), max_size=4), st.data())
def test_what_is_listed_of_some_packs(packs: list[tuple[bytes, list[Entry]]], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.booleans(), min_size=len(packs), max_size=len(packs)))
    assert listed(index_file.seal(packs, KEY), wanted) == list(itertools.compress(packs, wanted))


def test_more_packs_than_are_taken_apart_at_once() -> None:
    packs = [
        (
            sha256(b"%d" % number),
            [Entry(BlobKind.TREE, sha256(b"tree %d" % number), number, 99, 200)] * (number % 3),
        )
        for number in range(250)
    ]
    assert listed(index_file.seal(packs, KEY)) == packs


@pytest.mark.parametrize(
    "change",
    [
        {"id": "AB" * 32},
        {"id": "ab" * 31},
        {"id": " b" * 32},
        {"id": "\u00e9" * 64},
        {"id": None},
        {"type": "other"},
        {"type": ["data"]},
        {"offset": None},
        {"offset": -1},
        {"offset": 2**32},
        {"offset": 2**32 - 50},
        {"length": 31},
        {"length": 1.5},
        {"length": 2**64},
        {"uncompressed_length": 2**32 - 1},
        {"uncompressed_length": True},
    ],
)
def test_no_index_entry_is_taken_on_trust(change: dict[str, Any]) -> None:
    blob = {"id": "ab" * 32, "type": "data", "offset": 0, "length": 100, "uncompressed_length": 0}
    document = {"supersedes": [5], "packs": [{"id": "cd" * 32, "blobs": [blob]}]}
    assert listed(envelope.seal(KEY, document)) == [
        (bytes.fromhex("cd" * 32), [Entry(BlobKind.DATA, bytes.fromhex("ab" * 32), 0, 100, None)])
    ]
    blob |= change
    with pytest.raises(Damaged, match="index/1"):
        listed(envelope.seal(KEY, document))


@pytest.mark.parametrize(
    "packs",
    [
        7,
        {},
        [7],
        [None],
        [{}],
        [{"id": "cd" * 31, "blobs": []}],
        [{"id": "CD" * 32}],
        [{"id": "cd" * 32, "blobs": {}}],
        [{"id": "cd" * 32, "blobs": [None]}],
        [{"id": "cd" * 32, "blobs": [{"id": "ab" * 32, "type": "data", "offset": 0}]}],
    ],
)
def test_no_list_of_packs_is_taken_on_trust(packs: Any) -> None:
    with pytest.raises(Damaged, match="index/1"):
        listed(envelope.seal(KEY, {"packs": packs}))


@pytest.mark.parametrize("document", [{}, {"packs": None}, {"packs": []}])
def test_an_index_file_may_list_nothing(document: dict[str, Any]) -> None:
    assert listed(envelope.seal(KEY, document)) == []


def test_a_pack_may_be_listed_without_blobs() -> None:
    packs = [{"id": "cd" * 32, "blobs": None}, {"id": "ef" * 32}]
    read = listed(envelope.seal(KEY, {"packs": packs}))
    assert read == [(bytes.fromhex("cd" * 32), []), (bytes.fromhex("ef" * 32), [])]


# Sealed documents


@pytest.mark.parametrize(
    "plain",
    [b"", b"\x01{}", b"\x02", b"\x02{}", b"{", b"[]", b'{"a":1}x', b"[" * 100_000, b"{\xff}", b"{" + b"9" * 9999],
)
def test_a_document_that_is_none(plain: bytes) -> None:
    with pytest.raises(Damaged, match="locks/1"):
        envelope.open_sealed(KEY, KEY.seal(plain), file="locks/1")


def test_a_document_may_be_plain_json_as_in_version_1() -> None:
    assert envelope.open_sealed(KEY, KEY.seal(b'{"a":"b"}'), file="x").text("a") == "b"


SEALED: dict[str, tuple[bytes, Callable[[bytes, bytes], object]]] = {
    "snapshot": (
        snapshot.seal(ResticSnapshot(NOON, bytes(32), "web01", ("/web01",)), KEY),
        lambda stored, identity: snapshot.open_sealed(stored, KEY, identity=identity, file="f"),
    ),
    "lock": (
        lock_file.seal(LockFile(NOON, False, "host1", "root", 1), KEY),
        lambda stored, identity: lock_file.open_sealed(stored, KEY, identity=identity, file="f"),
    ),
    "config": (config.seal(config.generate(), KEY), lambda stored, _: config.open_sealed(stored, KEY)),
    "index": (index_file.seal([], KEY), lambda stored, _: list(index_file.open_sealed(stored, KEY, file="f"))),
    "key": (_key_file("one")[2], lambda stored, identity: keys.unlock("one", [("f", identity, stored)])),
}


@pytest.mark.parametrize("kind", SEALED)
def test_a_flipped_or_missing_byte_of_any_document_is_told(kind: str) -> None:
    stored, read = SEALED[kind]
    identity = sha256(stored)
    read(stored, identity)
    for at in range(len(stored)):
        flipped = stored[:at] + bytes([stored[at] ^ 0x20]) + stored[at + 1 :]
        for wrong in (flipped, stored[:at]):
            with pytest.raises(Damaged):
                read(wrong, identity)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.sampled_from(["time", "tree", "paths", "tags", "pid", "packs", "nodes", "id"]), json_values)
)
def test_whatever_a_sealed_document_says_it_is_read_or_damaged(document: dict[str, Any]) -> None:
    stored = envelope.seal(KEY, document)
    for _, read in SEALED.values():
        with contextlib.suppress(Damaged, WrongPassword):
            read(stored, sha256(stored))
    with contextlib.suppress(Damaged):
        tree.decode(envelope.dump(document), file="x")


# Times


@pytest.mark.parametrize(
    ("when", "written"),
    [
        (datetime(2026, 11, 22, 2, 30, tzinfo=UTC), "2026-11-22T02:30:00Z"),
        (NOON, "2026-11-22T12:00:00.5Z"),
        (datetime(2026, 11, 22, 2, 30, 0, 1, UTC), "2026-11-22T02:30:00.000001Z"),
        (datetime(2026, 11, 22, 2, 30, tzinfo=timezone(timedelta(hours=1))), "2026-11-22T01:30:00Z"),
    ],
)
def test_times_are_as_go_writes_them(when: datetime, written: str) -> None:
    assert fields.write_time(when) == written
    assert fields.Fields({"t": written}, file="x").time("t") == when


def test_times_are_read_as_restic_writes_them() -> None:
    read = fields.Fields({"t": "2026-11-22T03:30:00.123456789+01:00"}, file="x").time("t")
    assert read == datetime(2026, 11, 22, 2, 30, 0, 123456, UTC)
    with pytest.raises(ValueError, match="zone"):
        fields.write_time(datetime(2026, 11, 22))  # noqa: DTZ001  that is what is tested


# Trees


def test_a_tree_is_byte_for_byte_as_restics() -> None:
    one, two = "ab" * 32, "cd" * 32
    both = [bytes.fromhex(one), bytes.fromhex(two)]
    files = [
        FileNode("vm.json", FileContent(2, both[1:]), NOON),
        FileNode('a<b>&"c\\.raw', FileContent(5, both), NOON.replace(microsecond=0)),
        FileNode("empty.raw", FileContent(0, []), NOON),
    ]
    half = ',"mtime":"2026-11-22T12:00:00.5Z","atime":"2026-11-22T12:00:00.5Z","ctime":"2026-11-22T12:00:00.5Z"'
    whole, root = half.replace(".5Z", "Z"), ',"uid":0,"gid":0,"user":"root","group":"root"'
    assert tree.encode(files).decode().splitlines(keepends=True) == [
        (
            r'{"nodes":[{"name":"a\u003cb\u003e\u0026\\\"c\\\\.raw","type":"file","mode":384'
            f'{whole}{root},"size":5,"links":1,"content":["{one}","{two}"]}},'
            f'{{"name":"empty.raw","type":"file","mode":384{half}{root},"links":1,"content":[]}},'
            f'{{"name":"vm.json","type":"file","mode":384{half}{root},"size":2,"links":1,"content":["{two}"]}}]}}\n'
        )
    ]


@given(
    st.dictionaries(
        st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="/"), min_size=1).filter(
            lambda name: name not in (".", "..")
        ),
        st.lists(ids, max_size=3),
    )
)
def test_a_tree_is_read_as_it_was_written(files: dict[str, list[bytes]]) -> None:
    written = tree.encode(FileNode(name, FileContent(7, content), NOON) for name, content in files.items())
    nodes = tree.decode(written, file="x")
    assert [node.name for node in nodes] == [tree.quote(name) for name in sorted(files)]
    assert {node.name: list(node.content.chunks) for node in nodes} == {
        tree.quote(name): content for name, content in files.items()
    }


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "ä", "a\n", "\x7f"])
def test_names_that_we_do_not_write(name: str) -> None:
    with pytest.raises(ValueError, match="no name"):
        tree.encode([FileNode(name, FileContent(0, []), NOON)])


def test_a_name_twice_is_refused_and_is_damage() -> None:
    with pytest.raises(ValueError, match="twice"):
        tree.encode([FileNode("a", FileContent(0, []), NOON), FileNode("a", FileContent(0, []), NOON)])
    with pytest.raises(Damaged, match="twice"):
        tree.decode(b'{"nodes":[{"name":"a","type":"file"},{"name":"a","type":"file"}]}', file="tree 1")


def test_what_restic_writes_of_folders_and_links_is_read() -> None:
    text = (
        b'{"nodes":[{"name":"d","type":"dir","content":null,"subtree":"' + b"ab" * 32 + b'","new":[1]},'
        b'{"name":"l","type":"symlink","linktarget":"d","content":null}]}\n'
    )
    folder, link = tree.decode(text, file="x")
    assert (folder.subtree, folder.content, link.kind) == (bytes.fromhex("ab" * 32), FileContent(0, []), "symlink")
    with pytest.raises(Damaged, match="subtree"):
        tree.decode(b'{"nodes":[{"name":"d","type":"dir"}]}', file="x")


# Snapshots and locks


@given(
    st.builds(
        ResticSnapshot,
        time=st.datetimes(timezones=st.just(UTC)),
        tree=ids,
        hostname=st.text(),
        paths=st.lists(st.text()).map(tuple),
        tags=st.lists(st.text()).map(tuple),
        parent=st.none() | ids,
        original=st.none() | ids,
        program_version=st.text(),
        note=st.dictionaries(st.text(), st.none() | st.integers() | st.lists(st.text())),
    )
)
def test_a_snapshot_is_read_as_it_was_written(made: ResticSnapshot) -> None:
    stored = snapshot.seal(made, KEY)
    identity = sha256(stored)
    assert snapshot.open_sealed(stored, KEY, identity=identity, file="x") == replace(made, identity=identity)


def test_a_summary_is_read_as_it_was_written() -> None:
    summary = snapshot.Summary(NOON, NOON, 2, 0, 5, 1, 100, 50, 2, 1000).document()
    stored = snapshot.seal(ResticSnapshot(NOON, bytes(32), "web01", ("/web01",), summary=summary), KEY)
    assert snapshot.open_sealed(stored, KEY, identity=sha256(stored), file="x").summary == summary


@pytest.mark.parametrize("note", [None, 7, "text", [1]])
def test_a_note_that_is_none_is_empty(note: Any) -> None:
    document = {"time": "2026-11-22T12:00:00Z", "tree": "ab" * 32, "paths": ["/web01"], "vmfleece": note}
    stored = envelope.seal(KEY, document)
    assert snapshot.open_sealed(stored, KEY, identity=sha256(stored), file="x").note == {}


OURS = LockFile(NOON, False, "host1", "root", 4711)


@pytest.mark.parametrize("lock", [OURS, replace(OURS, exclusive=True, uid=1000, gid=100)])
def test_a_lock_is_read_as_it_was_written(lock: LockFile) -> None:
    stored = lock_file.seal(lock, KEY)
    assert lock_file.open_sealed(stored, KEY, identity=sha256(stored), file="x") == lock
    text = KEY.open(stored, file="x")
    assert b'"uid"' not in text


def test_only_exclusive_locks_exclude_however_old() -> None:
    old = replace(OURS, time=NOON - timedelta(days=2))
    assert not lock_file.conflicts(OURS, old)
    assert lock_file.conflicts(OURS, replace(old, exclusive=True))
    assert lock_file.conflicts(replace(OURS, exclusive=True), old)


@pytest.mark.parametrize(
    ("age", "hostname", "alive", "stale"),
    [
        (timedelta(minutes=1), "host1", True, False),
        (timedelta(minutes=1), "host1", False, True),
        (timedelta(minutes=1), "host2", False, False),
        (timedelta(minutes=30), "host2", False, False),
        (timedelta(minutes=31), "host2", True, True),
        (timedelta(minutes=31), "host1", True, True),
    ],
)
def test_whose_holder_is_gone(age: timedelta, hostname: str, alive: bool, stale: bool) -> None:
    lock = replace(OURS, hostname=hostname)
    assert lock_file.stale(lock, now=NOON + age, hostname="host1", alive=lambda _pid: alive) is stale
