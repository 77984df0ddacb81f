"""The keys: where they come from, and that nothing shows them."""

from __future__ import annotations

import base64
import logging
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from encrypted_kit import CANARY, NEW, OLD, ROW, A, lying, put_back, refused

from holdfast.backends.memory import MemoryBackend
from holdfast.contract import Op
from holdfast.errors import (
    HoldfastError,
    InvalidInputError,
    UnavailableError,
)
from holdfast.wrappers.encrypted import MAX_PLAIN_BYTES, Encrypted
from holdfast.wrappers.keyring import Keyring, new_entry


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b64(CANARY), "entry 1 is not id=base64"),
        (f"k={b64(OLD)},{b64(CANARY)}", "entry 2 is not id=base64"),
        (f"{b64(CANARY)}=k", "entry 1 is not id=base64"),
        (f"a b={b64(CANARY)}", "entry 1 is not id=base64"),
        (f"{'k' * 33}={b64(CANARY)}", "entry 1 is not id=base64"),
        (f"k={b64(CANARY[:31])}", "'k' is 31 bytes"),
        (f"k={b64(CANARY + b'x')}", "'k' is 33 bytes"),
        (f"k={b64(CANARY)[:-2]}!=", "'k' is not base64"),
        (f"k={b64(CANARY)},k={b64(OLD)}", "'k' stands twice"),
        (f"k={b64(CANARY)},l={b64(CANARY)}", "'k' and 'l' are the same"),
        ("k=", "entry 1 is not id=base64"),
        ("  ", "is not set"),
    ],
)
def test_keys_that_cannot_be_used_are_refused_without_being_shown(
    text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_KEYS", text)
    with pytest.raises(InvalidInputError, match="HOLDFAST_KEYS") as caught:
        Keyring.from_env()
    assert said in str(caught.value)
    _require_no_canary(caught.value, extra=text.strip() or "-")


def _require_no_canary(error: BaseException, extra: str = "") -> None:
    """Neither the message nor a traceback with the locals of our frames shows key material."""
    ours = "".join(
        "".join(traceback.StackSummary.from_list([frame]).format())
        for frame in traceback.TracebackException.from_exception(error, capture_locals=True).stack
        if "/holdfast/" in frame.filename
    )
    shown = "\n".join([str(error), repr(error), ours])
    for form in (CANARY.decode(), b64(CANARY), b64(CANARY).rstrip("="), repr(CANARY), CANARY.hex(), extra):
        if len(form) > 20:
            assert form not in shown


async def test_no_error_log_or_repr_shows_a_key(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    keys = Keyring({"k": CANARY, "l": NEW})
    memory = MemoryBackend()
    store = Encrypted(memory, keys, witness=tmp_path / "w")
    shown = [repr(keys), str(keys), repr(store), repr(keys.current), f"{vars(store)}"]
    promised = await store.open()
    await store.commit("main", {A: ROW}, {}, op=Op("w", 1))
    whole = lying(memory, A)
    errors: list[HoldfastError] = []
    for payload in (whole.payload[:-3] + b'A"}', b"{}", b"\0", whole.payload.replace(b'"k"', b'"m"')):
        put_back(memory, A, whole._replace(payload=payload))
        errors.append(await refused(store, A))
    for bad in ({"k": CANARY[:5]}, {"": CANARY}, {"k": CANARY.decode()}, [CANARY], {"k": bytearray(CANARY)}):
        with pytest.raises(InvalidInputError) as caught:
            Keyring(bad)  # type: ignore[arg-type]
        errors.append(caught.value)
    with pytest.raises(InvalidInputError) as caught:
        await store.commit("main", {A: b" " * (MAX_PLAIN_BYTES + 1)}, {}, op=Op("w", 2))
    errors.append(caught.value)
    await store.close()
    for error in errors:
        _require_no_canary(error)
    shown += [caplog.text, f"{promised}", (tmp_path / "w").read_text(), lying(memory, A).payload.decode()]
    for text in shown:
        for form in (CANARY.decode(), b64(CANARY), CANARY.hex()):
            assert form not in text
    assert repr(keys) == "Keyring(k, l; current: k)"


@pytest.mark.parametrize("form", ["mapping", "text", "sync", "async"])
async def test_keys_come_from_a_mapping_a_text_or_a_function(form: str) -> None:
    asked = 0

    def give() -> Mapping[str, bytes]:
        nonlocal asked
        asked += 1
        return {"new": NEW, "old": OLD}

    async def give_later() -> str:
        nonlocal asked
        asked += 1
        return f"new={b64(NEW)}, old={b64(OLD)},"

    sources: dict[str, Any] = {"mapping": give(), "text": await give_later(), "sync": give, "async": give_later}
    asked = 0
    keys = Keyring(sources[form])
    store = Encrypted(MemoryBackend(), keys)
    await store.open()
    assert keys.ids == ("new", "old")
    assert asked == (form in ("sync", "async"))
    await store.commit("main", {A: ROW}, {}, op=Op("w", 1))
    assert (await store.read("main", [A]))[A].payload == ROW
    await store.close()


async def test_a_function_for_the_keys_that_fails_opens_nothing() -> None:
    def fails() -> Mapping[str, bytes]:
        raise OSError("the vault is closed")

    memory = MemoryBackend()
    with pytest.raises(UnavailableError, match="OSError") as caught:
        await Encrypted(memory, Keyring(fails)).open()
    assert isinstance(caught.value.__cause__, OSError)
    await memory.open()  # it was not opened
    with pytest.raises(InvalidInputError, match="returned: keys come as a mapping"):
        await Encrypted(MemoryBackend(), Keyring(lambda: None)).open()  # type: ignore[arg-type,return-value]
    with pytest.raises(InvalidInputError, match="empty"):
        await Encrypted(MemoryBackend(), Keyring({})).open()
    with pytest.raises(InvalidInputError, match="pass a Keyring"):
        Encrypted(MemoryBackend(), {"k": OLD})  # type: ignore[arg-type]


def test_a_fresh_key_is_one_that_the_environment_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {new_entry() for _ in range(3)}
    assert len(entries) == 3
    monkeypatch.setenv("HOLDFAST_KEYS", ",".join(sorted(entries)))
    assert len(Keyring.from_env().ids) == 3


def test_without_the_package_one_clear_error_names_the_extra() -> None:
    code = (
        "import os, sys; sys.modules['cryptography'] = None\n"
        f"os.environ['HOLDFAST_KEYS'] = {new_entry()!r}\n"
        "from holdfast.urls import open_backend\n"
        "open_backend('encrypted+memory:')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "holdfast.errors.InvalidInputError" in done.stderr
    assert "pip install 'holdfast[encryption]'" in done.stderr
