"""``holdfast recover``, ``adopt``, ``close``, ``clear`` and ``show --audit``, as users call them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from holdfast.backends.file import FileBackend
from holdfast.backends.sqlite import SqliteBackend
from holdfast.cli import main
from holdfast.contract import Backend, Key, Survives
from holdfast.domains import context_key, guard_key, risk_key
from holdfast.engine import registry
from holdfast.engine.reconcile import session_row, slot_of
from holdfast.engine.worker import SignOfLife
from holdfast.names import Context
from holdfast.rows import Guard, Owner, RiskPosition, Row, Signal
from holdfast.rules.params import reset_config
from holdfast.rules.signals import State
from holdfast.store import Store

T0 = 1_704_067_200_000
MINUTE = 60_000
BTC = Context("replay", "BTCUSDT", "patient")
NAME = "replay/BTCUSDT/patient"
SIGNAL_KEY = context_key("signal", BTC)
ORPHAN = risk_key("other", Context("replay", "ETHUSDT", "gone"))
BOT = """
from holdfast import add_risk, add_strategy

@add_risk(risk_name="limit")
def limit(payload):
    return True

@add_strategy(strategy_name="patient", interval="1m", risk_name="limit", symbols=("BTCUSDT",){more})
def patient(symbol, when_ms):
    return None
"""


EXCHANGE = f"""
from holdfast import add_exchange
from holdfast.market.protocol import MarketEnded

class Past:
    async def get_candles(self, symbol, interval, since_ms, limit):
        opens = [{T0} + n * 60_000 for n in range(-40, 10)]
        return [(at, 43300, 43300, 43300 if at < {T0} + 5 * 60_000 else LOW, 43300, 1) for at in opens
                if at >= since_ms][:limit]

    async def wait_closed(self, participant, after_ms):
        if after_ms is not None:
            raise MarketEnded("that was all")
        return {T0} + 9 * 60_000

add_exchange(Past(), exchange_name="replay")
"""


def candles(*closes: tuple[float, float, float]) -> str:
    """A candle file: 40 quiet minutes before the bot went down, then one (close, high, low) a minute."""
    rows = [(43000.0, 43000.0, 43000.0)] * 40 + list(closes)
    lines = ["timestamp,open,high,low,close,volume"]
    lines += [f"{T0 + (n - 40) * MINUTE},{c},{h},{low},{c},1" for n, (c, h, low) in enumerate(rows)]
    return "\n".join(lines) + "\n"


QUIET = [(43000.0, 43000.0, 43000.0)] * 5
STOPPED = [*QUIET[:3], (43000.0, 43000.0, 41900.0), *QUIET]


def open_rows(**more: Any) -> dict[Key, Row]:
    signal = Signal(
        id="s-1", position="long", price_open=43000.0, price_take_profit=44000.0, price_stop_loss=42000.0,
        minute_estimated_time=90, symbol="BTCUSDT", exchange_name="replay", strategy_name="patient",
        scheduled_at=T0, pending_at=T0,
    )  # fmt: skip
    return {
        context_key("session", BTC): session_row(BTC, State(last_candle_ms=T0 - MINUTE, last_event=1), ("limit",)),
        SIGNAL_KEY: msgspec.structs.replace(signal, **more),
        risk_key("limit", BTC): slot_of(signal),
        guard_key("limit"): Guard(changes=1),
    }


def write(backend: Backend, *commits: dict[Key, Row], act: Any = None) -> None:
    async def go() -> None:
        store = Store(backend, require=Survives.NOTHING)
        await store.open()
        for rows in commits:
            await store.writer("test").commit(rows)
        if act is not None:
            await act(store)
        await store.close()

    asyncio.run(go())


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bot.py").write_text(BOT.replace("{more}", ""))
    (tmp_path / "BTCUSDT-quiet.csv").write_text(candles(*QUIET))
    (tmp_path / "BTCUSDT-stopped.csv").write_text(candles(*STOPPED))
    yield
    registry.reset()
    reset_config()


def call(*arguments: str) -> int:
    registry.reset()
    return main(list(arguments))


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert call(*arguments, "--json") == code
    return json.loads(capsys.readouterr().out)


RECOVER = ("recover", "bot.py", "--store", "data", "--market", "BTCUSDT=BTCUSDT-stopped.csv")


def test_a_plan_is_shown_then_done_then_nothing_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    write(FileBackend(Path("data")), open_rows())
    before = answer(capsys, "show", "data")
    plan = answer(capsys, *RECOVER, "--plan")
    (told,) = plan["contexts"]
    assert (plan["planned"], told["verdict"], told["decided"]) == (True, "hit_stop", None)
    assert told["atMs"] == T0 + 4 * MINUTE
    assert told["text"].startswith("hit its stop at 2024-01-01 00:04")
    assert answer(capsys, "show", "data") == before, "a plan changes nothing"

    assert call(*RECOVER) == 0
    said = capsys.readouterr().out
    assert "hit_stop" in said and "step" in said
    (trade,) = answer(capsys, "show", "data")["trades"]
    assert (trade["reason"], trade["closedAt"]) == ("stop_loss", T0 + 4 * MINUTE)
    assert call("check", "data") == 0
    again = answer(capsys, *RECOVER)
    assert again["contexts"][0]["verdict"] is None
    (record,) = answer(capsys, "show", "data", "--audit")["plans"]
    assert (record["verdict"], record["decision"]["what"], record["decision"]["by"]) == ("hit_stop", "step", "policy")
    assert [one["reason"] for one in record["events"]] == ["stop_loss"]
    assert call("show", "data", "--audit", "--plain") == 0
    assert "hit_stop" in capsys.readouterr().out


def test_the_table_of_a_plan_names_what_no_strategy_watches(capsys: pytest.CaptureFixture[str]) -> None:
    other = {context_key("signal", Context("replay", "ETHUSDT", "gone")): msgspec.structs.replace(
        open_rows()[SIGNAL_KEY], symbol="ETHUSDT", strategy_name="gone")}  # fmt: skip
    write(FileBackend(Path("data")), {**open_rows(), **other})
    assert call(*RECOVER[:4], "--plan", "--market", "BTCUSDT=BTCUSDT-quiet.csv", "--plain") == 0
    said = capsys.readouterr().out
    assert "still_valid: still valid" in said
    assert "replay/ETHUSDT/gone: 's-1' is open, and no strategy" in said


FLAT = (43000.0, 43000.0, 43000.0)
VERDICTS: dict[str, tuple[list[tuple[float, float, float]], str, str]] = {
    "target": ([*[FLAT] * 3, (43000.0, 44000.0, 43000.0), *[FLAT] * 5], "hit_target",
               "hit its target at 2024-01-01 00:04"),
    "levels": ([(43350.0, 43350.0, 43350.0)] * 6, "partial", "still valid; levels +10 +20 +30"),
    "time": ([FLAT] * 95, "expired", "its time was over at 2024-01-01 01:30"),
    "both": ([*[FLAT] * 3, (43000.0, 44100.0, 41900.0), *[FLAT] * 5], "hit_target",
             "both_hit (take_profit) makes it the take_profit"),
    "stop": ([*[FLAT] * 3, (43000.0, 44100.0, 41900.0), *[FLAT] * 5], "hit_stop",
             "both_hit (stop_loss) makes it the stop_loss"),
}  # fmt: skip


@pytest.mark.parametrize("name", VERDICTS)
def test_each_verdict_is_said_in_words_and_is_what_then_happens(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:  # fmt: skip
    rows, verdict, words = VERDICTS[name]
    (tmp_path / "BTCUSDT.csv").write_text(candles(*rows))
    if name == "stop":
        told = BOT.replace("{more}", "") + "\nimport holdfast\nholdfast.set_config(both_hit='stop_loss')\n"
        (tmp_path / "bot.py").write_text(told)
    write(FileBackend(Path("data")), open_rows())
    arguments = ("recover", "bot.py", "--store", "data", "--market", "BTCUSDT=BTCUSDT.csv")
    (plan,) = answer(capsys, *arguments, "--plan")["contexts"]
    assert (plan["verdict"], plan["bothHit"]) == (verdict, name in ("both", "stop"))
    assert words in plan["text"]
    (done,) = answer(capsys, *arguments)["contexts"]
    assert (done["verdict"], done["events"]) == (plan["verdict"], plan["events"])
    assert done["committed"] == [event["number"] for event in plan["events"]]
    again = answer(capsys, *arguments)["contexts"][0]
    assert again["committed"] == []
    assert call("check", "data") == 0


def test_a_strategy_that_asks_stops_until_it_is_decided(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:  # fmt: skip
    (tmp_path / "bot.py").write_text(BOT.replace("{more}", ', recovery="ask"') + EXCHANGE.replace("LOW", "41900"))
    write(FileBackend(Path("data")), open_rows())
    arguments = RECOVER[1:4]
    (planned,) = answer(capsys, "recover", *arguments, "--plan", code=4)["contexts"]
    assert (planned["verdict"], planned["decided"]) == ("hit_stop", None)
    assert "--decide step" in planned["undecided"], "the plan says that somebody has to decide"
    assert answer(capsys, "recover", *arguments, "--plan", "--decide", "step")["contexts"][0]["undecided"] is None
    assert call("recover", *arguments) == 4
    said = capsys.readouterr().out
    assert "--decide step" in said and "not yet: somebody must" in said
    assert said.startswith("Not recovered")
    assert call("run", *arguments, "--plain") == 4
    assert "--decide step" in "".join(capsys.readouterr())
    assert len(answer(capsys, "show", "data")["contexts"]) == 1
    (record,) = answer(capsys, "show", "data", "--audit")["plans"]
    assert record["decision"] is None
    done = answer(capsys, "recover", *arguments, "--decide", "step")
    assert done["contexts"][0]["decided"] == "step"
    (record,) = answer(capsys, "show", "data", "--audit")["plans"]
    assert "@" in record["decision"]["by"]
    assert call("check", "data") == 0


def test_what_could_not_be_planned_or_recovered_is_listed_with_its_reason(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:  # fmt: skip
    market = EXCHANGE.replace("LOW", "43300").replace(
        "opens = [", "raise OSError('the market is down')\n        opens = ["
    )
    market += "import holdfast\nholdfast.set_config(get_candles_retry_delay_ms=1)\n"  # it is asked three times
    (tmp_path / "bot.py").write_text(BOT.replace("{more}", "").replace('",)', '", "ETHUSDT")') + market)
    write(FileBackend(Path("data")), open_rows())
    arguments = RECOVER[1:4]
    told = answer(capsys, "recover", *arguments, "--plan", code=3)["contexts"]
    assert [(one["symbol"], one["verdict"]) for one in told] == [("BTCUSDT", None), ("ETHUSDT", None)]
    assert "the market is down" in told[0]["failed"] and told[1]["failed"] is None
    assert call("recover", *arguments, "--plan") == 3
    said = capsys.readouterr()
    assert said.out.startswith(
        "Recovery plan (nothing was changed); 1 of 2 contexts failed; nothing is open or waits in 1 of 2 contexts\n"
    )
    assert "the market is down" in said.out and "the market is down" in said.err
    assert call("recover", *arguments) == 3
    assert capsys.readouterr().out.startswith("Recovered 1 of 2 contexts; 1 of 2 contexts failed")
    assert call("recover", *arguments, "--symbols", "BTCUSDT") == 3
    assert capsys.readouterr().out.startswith("Not recovered; 1 of 1 contexts failed")
    assert call("recover", *arguments, "--symbols", "ETHUSDT") == 0
    assert capsys.readouterr().out == (
        "Recovered; nothing is open or waits in the context\n"
        "replay/BTCUSDT/patient: 's-1' is open, and no strategy of this file on these symbols watches it\n"
    )


@pytest.mark.parametrize("domain", ["signal", "session"])
def test_what_is_in_quarantine_is_listed_in_the_plan_and_is_not_recovered(
    domain: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def break_it(store: Store) -> None:
        await store.quarantine(context_key(domain, BTC), "its checksum is wrong")

    write(FileBackend(Path("data")), open_rows(), act=break_it)
    (told,) = answer(capsys, *RECOVER, "--plan", code=4)["contexts"]
    assert "in quarantine: look at it" in "".join(told["stopped"])
    assert (told["verdict"] is None) == (domain == "signal")
    assert call(*RECOVER) == 4
    said = capsys.readouterr().out
    assert said.startswith("Not recovered" if domain == "signal" else "Recovered")
    assert "in quarantine" in said


def test_the_operator_may_close_what_is_still_valid(capsys: pytest.CaptureFixture[str]) -> None:
    write(FileBackend(Path("data")), open_rows())
    arguments = (*RECOVER[:4], "--market", "BTCUSDT=BTCUSDT-quiet.csv", "--decide", "close")
    (told,) = answer(capsys, *arguments)["contexts"]
    assert (told["verdict"], told["events"][-1]["reason"]) == ("closed", "operator")
    assert answer(capsys, "show", "data")["trades"][0]["priceClose"] == 43000.0


@pytest.mark.parametrize(
    ("context", "said"),
    [("replay/BTCUSDT/typo", "adds no strategy 'typo'"), ("typo/BTCUSDT/patient", "adds no exchange 'typo'")],
)
def test_a_position_that_nobody_would_watch_is_refused_or_warned_of(
    context: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "bot.py").write_text(BOT.replace("{more}", "") + EXCHANGE.replace("LOW", "43300"))
    write(FileBackend(Path("data")), open_rows())
    position = ("--position", "long", "--open", "43000", "--take-profit", "44000", "--stop-loss", "42000",
                "--minutes", "60", "--at", str(T0), "--store", "data")  # fmt: skip
    assert call("adopt", context, *position, "--bot", "bot.py") == 2
    assert said in capsys.readouterr().err
    assert call("show", "data") == 0
    assert "typo" not in capsys.readouterr().out
    assert call("adopt", context, *position) == 0
    assert "nobody watches" in capsys.readouterr().err
    assert call("adopt", "replay/ETHUSDT/patient", *position, "--bot", "bot.py") == 0
    assert call("adopt", "replay/SOLUSDT/patient", *position) == 0
    assert "nobody watches" not in capsys.readouterr().err, "another symbol of the same bot is nothing strange"


def test_close_adopt_and_clear_are_on_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    async def break_it(store: Store) -> None:
        await store.quarantine(SIGNAL_KEY, "test")

    slot = RiskPosition(strategy_name="gone", exchange_name="replay", symbol="ETHUSDT", open_timestamp=T0)
    write(FileBackend(Path("data")), {**open_rows(), ORPHAN: slot}, act=break_it)
    assert call("check", "data") == 1
    assert call(*RECOVER, "--plan") == 4
    assert "in quarantine" in capsys.readouterr().out
    assert call("adopt", NAME, "--store", "data", "--why", "looked at it") == 0
    assert "adopt" in capsys.readouterr().out
    assert call("clear", str(ORPHAN), "--store", "data") == 0
    assert call("check", "data") == 0
    done = answer(capsys, "close", NAME, "--price", "43250", "--at", "2024-01-01T00:10", "--store", "data")
    assert (done["event"]["reason"], done["event"]["atMs"]) == ("operator", T0 + 10 * MINUTE)
    assert call("check", "data") == 0
    position = ("--position", "short", "--open", "43000", "--take-profit", "42000", "--stop-loss", "44000")
    adopt = ("adopt", NAME, *position, "--minutes", "60", "--at", "2024-01-01T00:20", "--store", "data")
    assert answer(capsys, *adopt)["event"]["kind"] == "opened"
    assert call("check", "data") == 0
    done = answer(capsys, "close", NAME, "--bot", "bot.py", "--price", "42500", "--at", str(T0 + 30 * MINUTE),
                  "--store", "data")  # fmt: skip
    assert done["event"]["pnlPercent"] > 0
    trail = answer(capsys, "show", "data", "--audit")["audit"]
    assert sorted(row["action"] for row in trail) == ["adopt", "adopt", "clear", "close", "close"]
    assert [row["why"] for row in trail if row.get("why")] == ["looked at it"]
    assert call("check", "data") == 0
    assert call("show", "data", "--audit", "--plain") == 0
    assert "looked at it" in capsys.readouterr().out


def test_close_at_the_newest_price_asks_the_bots_own_exchange(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:  # fmt: skip
    (tmp_path / "with_exchange.py").write_text(BOT.replace("{more}", "") + EXCHANGE.replace("LOW", "43300"))
    write(FileBackend(Path("data")), open_rows())
    done = answer(capsys, "close", NAME, "--bot", "with_exchange.py", "--store", "data")
    assert (done["event"]["priceClose"], done["event"]["atMs"]) == (43300.0, T0 + 10 * MINUTE)


MISTAKES = {
    ("recover", "absent.py"): "there is no file absent.py",
    ("recover", "bot.py", "--market", "BTCUSDT=BTCUSDT-quiet.csv", "--store", "nowhere"): "there is no store at",
    ("recover", "bot.py", "--store", "data"): "adds no exchange",
    ("recover", "bot.py", "--minutes", "5", "--store", "data"): "give --market too",
    ("recover", "bot.py", "--symbols", ",", "--store", "data"): "names none",
    (*RECOVER, "--symbols", "DOGEUSDT"): "the market has no DOGEUSDT",
    ("close", NAME, "--store", "data"): "at which price?",
    ("close", NAME, "--price", "-1", "--store", "data"): "give a price above 0",
    ("close", NAME, "--price", "nan", "--store", "data"): "give a price above 0",
    ("close", NAME, "--price", "43000", "--store", "data"): "--at TIME",
    ("close", NAME, "--price", "43000", "--at", "noon", "--store", "data"): "epoch milliseconds or ISO text",
    ("close", "BTCUSDT", "--price", "43000", "--store", "data"): f"EXCHANGE/SYMBOL/STRATEGY: the store has {NAME}",
    ("close", "replay/ETHUSDT/patient", "--price", "43000", "--store", "data"): "nothing is open",
    ("close", NAME, "--price", "43000", "--store", ""): "the store's name is empty",
    ("adopt", NAME, "--store", "data"): "nothing that can be adopted",
    ("adopt", NAME, "--position", "long", "--store", "data"): "needs --open, --take-profit, --stop-loss, --minutes",
    ("adopt", str(SIGNAL_KEY), "--store", "data"): "nothing of it is in quarantine",
    ("adopt", "owner/x/owner", "--store", "data"): "cannot be adopted",
    ("adopt", str(SIGNAL_KEY), "--position", "long", "--open", "1", "--take-profit", "2", "--stop-loss", "0.5",
     "--minutes", "5", "--store", "data"): "is a key",
    ("adopt", NAME, "--position", "long", "--open", "43000", "--take-profit", "42000", "--stop-loss", "44000",
     "--minutes", "5", "--store", "data"): "cannot be watched",
    ("clear", "nonsense", "--store", "data"): "is no key",
    ("clear", str(SIGNAL_KEY), "--store", "data"): "close it",
    ("clear", str(context_key("session", BTC)), "--store", "data"): "means something",
    ("clear", str(risk_key("limit", BTC)), "--store", "data"): "close or clear that",
    ("clear", str(ORPHAN), "--store", "data"): "there is no such row",
    ("clear", str(SIGNAL_KEY).replace("BTC", "ETH"), "--store", "data"): "there is no such row",
}  # fmt: skip


@pytest.mark.parametrize("arguments", MISTAKES, ids=[" ".join(one)[:70] for one in MISTAKES])
def test_a_mistake_is_one_line_and_changes_nothing(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    write(FileBackend(Path("data")), open_rows())
    before = answer(capsys, "show", "data")
    assert call(*arguments) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if " lies on " not in line]
    assert len(told) == 1 and MISTAKES[arguments] in told[0], told
    assert answer(capsys, "show", "data") == before
    assert answer(capsys, "show", "data", "--audit")["audit"] == []


def test_a_store_that_is_open_in_a_bot_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    write(FileBackend(Path("data")), open_rows())

    async def beside() -> list[int]:
        store = Store(FileBackend(Path("data")), require=Survives.NOTHING)
        await store.open()
        try:
            arguments = (("close", NAME, "--price", "43000"), ("adopt", NAME), ("clear", str(ORPHAN)))
            codes = [await asyncio.to_thread(call, *one, "--store", "data") for one in arguments]
            return [*codes, await asyncio.to_thread(call, *RECOVER), await asyncio.to_thread(call, *RECOVER, "--plan")]
        finally:
            await store.close()

    assert asyncio.run(beside()) == [3, 3, 3, 3, 0], "only the plan works beside a running bot"


def test_on_a_shared_store_a_living_owner_is_respected(capsys: pytest.CaptureFixture[str]) -> None:
    """The owner's process is this one: it lives, and gives signs of life."""

    async def beside() -> list[int]:
        store = Store(SqliteBackend(Path("shared.db")))
        await store.open()
        sign = SignOfLife(store, holder="bot", lease_seconds=1.0, sleep=asyncio.sleep, clock=lambda: T0)
        owner = Owner(holder="bot", epoch=1, host="here", pid=1, since_ms=T0)
        await store.writer("test").commit({**open_rows(), context_key("owner", BTC): owner})

        class Session:
            context, owner, is_proven = BTC, None, True

            def fence(self, error: Exception) -> None: ...

        session: Any = Session()
        await sign.join(session)
        try:
            arguments = (("close", NAME, "--price", "43000", "--at", str(T0)), RECOVER[:2] + RECOVER[4:])
            return [await asyncio.to_thread(call, *one, "--store", "sqlite:shared.db") for one in arguments]
        finally:
            await sign.leave(session)
            await store.close()

    assert asyncio.run(beside()) == [3, 3]
    assert "alive" in capsys.readouterr().err
    assert call("close", NAME, "--price", "43000", "--at", str(T0), "--store", "sqlite:shared.db") == 0
