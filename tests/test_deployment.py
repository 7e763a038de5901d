"""An exported run: as Flower's messages in this process, and on a real SuperLink and three SuperNodes on loopback.

On loopback every message starts a process that loads torch, so those tests take a minute on two cores: they run where
FEDSIM_DEPLOYMENT=1.
"""

import contextlib
import datetime
import importlib.util
import io
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

import fedsim
from fedsim import cli
from fedsim.flower.nodes import LocalNodes

BIN = Path(sys.executable).parent
on_loopback = pytest.mark.skipif("FEDSIM_DEPLOYMENT" not in os.environ, reason="a minute: FEDSIM_DEPLOYMENT=1 runs it")
NODES = 3
SMALL = ("model=logreg", f"partition.num_clients={NODES}", "partition.alpha=1", "fraction=1", "data.validation=0")


class Loopback:
    """A SuperLink and SuperNodes of one machine, and `flwr run` on them."""

    def __init__(self, place, link=("--insecure",), node=("--insecure",)):
        self.place, self.node_options = place, node
        self.port, *self.node_ports = free_ports(1 + NODES)
        self.environment = os.environ | {
            "FLWR_HOME": str(place / "home"), "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_LOG_LEVEL": "INFO",
            "FLWR_DISABLE_UPDATE_CHECK": "1", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }  # fmt: skip
        self.logs, self.started = {}, {}
        (place / "home").mkdir(parents=True)
        words = ["--disable-runtime-dependency-installation", "--host", "127.0.0.1", "--port", str(self.port)]
        self.start("link", "flower-superlink", *link, *words)
        self.nodes = [f"node{i}" for i in range(NODES)]

    def start(self, name, *words):
        self.logs[name] = self.place / f"{name}.log"
        with self.logs[name].open("ab") as log:
            self.started[name] = subprocess.Popen(
                [str(BIN / words[0]), *words[1:]], stdout=log, stderr=log, env=self.environment, cwd=self.place,
                start_new_session=True,
            )  # fmt: skip

    def start_nodes(self):
        for i, name in enumerate(self.nodes):
            self.start_node(i, name)

    def start_node(self, i, name, options=None):
        words = ["--superlink", f"127.0.0.1:{self.port}", "--port", str(self.node_ports[i])]
        about = ["--node-config", f"partition-id={i} num-partitions={NODES}"]
        self.start(name, "flower-supernode", *(self.node_options if options is None else options), *words, *about)

    def kill(self, name):
        process = self.started.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self):
        for name in list(self.started):
            self.kill(name)

    def configure(self, connection):
        head = ["[superlink]", 'default = "local"', "[superlink.local]", f'address = "127.0.0.1:{self.port}"']
        (self.place / "home" / "config.toml").write_text("\n".join([*head, *connection]) + "\n")

    def wait_for(self, name, text, seconds=30):
        end = time.monotonic() + seconds
        while text not in self.logs[name].read_text():
            assert time.monotonic() < end, self.said()
            time.sleep(0.1)

    def flwr_run(self, app, connection=("insecure = true",), config=""):
        self.configure(connection)
        self.wait_for("link", "Uvicorn running")
        words = [str(BIN / "flwr"), "run", str(app), "local", "--stream", *(["--run-config", config] if config else [])]
        return subprocess.Popen(
            words, env=self.environment, cwd=self.place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def said(self):
        return "\n\n".join(f"== {name}\n{path.read_text()[-4000:]}" for name, path in self.logs.items())


def free_ports(number):
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(number):
            one = stack.enter_context(contextlib.closing(socket.socket()))
            one.bind(("127.0.0.1", 0))
            found.append(one.getsockname()[1])
        return found


@pytest.fixture
def loopback(tmp_path):
    place = Loopback(tmp_path / "deployment")
    yield place
    place.close()


def rows_of(folder):
    path = folder / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def exported(folder, *words):
    assert cli.main(["export", "flower", str(folder), *words]) == 0
    return folder


def run_to_the_end(loopback, app, folder, config="", connection=("insecure = true",)):
    process = loopback.flwr_run(app, connection, f'folder="{folder}" {config}'.strip())
    try:
        said, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert (folder / "model.safetensors").exists(), said + loopback.said()
    return said


def load(app):
    """Import an exported app from its folder, under a name of its own."""
    (path,) = app.glob("*/app.py")
    spec = importlib.util.spec_from_file_location(f"exported_{app.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def deploy(app, folder, monkeypatch=None, gone_after=None, **config):
    """Run the ServerApp of an exported run over its ClientApp, in this process; return the weights."""
    module = load(app)
    said = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    context = Context(1, 0, {}, RecordDict(), {**said, "folder": str(folder), **config})
    grid = LocalNodes(module.client, NODES)
    if gone_after is not None:
        send, times = grid.send_and_receive, iter(range(100))

        def answer(messages, *, timeout=None):
            grid.gone |= {1} if next(times) >= gone_after else set()
            return send(messages)

        monkeypatch.setattr(grid, "send_and_receive", answer)
    module.server(grid, context)
    return load_file(folder / "model.safetensors")


def same(simulated, deployed, tolerance):
    assert deployed.keys() == simulated.keys()
    for name, value in simulated.items():
        torch.testing.assert_close(deployed[name].to(value.dtype), value, rtol=tolerance, atol=tolerance)


# In float64 what differs is one rounding of w + Δ − w: 1e-16, and what a rule's roots and spectra make of it.
EQUAL = [
    ("fedld",),
    ("fedhyper_g_cl",),
    ("scaffold",),  # client state and two uploads
    ("krum", "strategy.num_byzantine=0"),
    ("flower/fedadam",),
    ("fedavg", "model.local=head", "model=mlp"),
    ("fedavg", "client.local_epochs=2", "client.momentum=0.9", "client.lr_decay=0.5"),
]


@pytest.mark.parametrize("words", EQUAL, ids=lambda words: words[0] + str(len(words)))
def test_an_exported_run_is_the_simulated_one(words, tmp_path):
    strategy, *rest = words
    small = [word for word in SMALL if word.split("=")[0] not in {other.split("=")[0] for other in rest}]
    run = fedsim.simulate(f"strategy={strategy}", *small, *rest, num_rounds=3, dtype="float64", folder=tmp_path / "run")
    deployed = deploy(exported(tmp_path / "app", f"run={tmp_path / 'run'}"), tmp_path / "out")
    same(load_file(run.folder / "model.safetensors"), deployed, 1e-9)
    if "/" not in strategy:
        rows = rows_of(tmp_path / "out")
        assert [(row["round"], row["num_participants"], row["missing"]) for row in rows] == [
            (r, 3, "") for r in (1, 2, 3)
        ]
        for row, simulated in zip(rows, run.rounds, strict=True):
            assert row["train_loss"] == pytest.approx(simulated["train_loss"], rel=1e-9)


def test_running_statistics_travel_along(tmp_path, monkeypatch):
    tmp_path.joinpath("my_norm.py").write_text(
        "from torch import nn\n"
        "def model(input_shape, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Linear(6, num_classes))\n"
    )
    tmp_path.joinpath("mine/model").mkdir(parents=True)
    tmp_path.joinpath("mine/model/norm.yaml").write_text(
        "# Norm.\ndefaults: [_shared, _self_]\n_target_: my_norm.model\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["model=norm", "partition=iid", *SMALL[1:2], "fraction=1", "num_rounds=2", "client.batch_size=null"]
    made = ["--config-dir", str(tmp_path / "mine"), "dtype=float64"]
    assert cli.main(["run", *words, *made, f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    deployed = deploy(exported(tmp_path / "app", f"run={tmp_path / 'run'}"), tmp_path / "out")
    simulated = load_file(tmp_path / "run" / "model.safetensors")
    assert simulated["2.running_mean"].abs().max() > 0.01
    simulated.pop("2.num_batches_tracked")
    deployed.pop("2.num_batches_tracked", None)
    same(simulated, deployed, 1e-9)
    said = refused(["export", "flower", str(tmp_path / "b"), *words, *made, "strategy=flower/fedavg"])
    assert "Flower's strategies get parameters alone" in said


def test_the_rows_name_a_client_that_is_gone(tmp_path, monkeypatch):
    app = exported(tmp_path / "app", *SMALL, "num_rounds=3", "strategy=fedavg")
    deploy(
        app, tmp_path / "out", monkeypatch, gone_after=2, **{"fraction-evaluate": 0.5}
    )  # after one round's two exchanges
    rows = rows_of(tmp_path / "out")
    assert [(row["num_participants"], row["missing"]) for row in rows] == [(3, ""), (2, "1"), (2, "1")]
    assert all(0 < row["eval_acc"] <= 1 for row in rows)


def test_a_node_trains_on_data_of_its_own(tmp_path, monkeypatch):
    app = exported(tmp_path / "app", *SMALL, "num_rounds=1", "strategy=fedavg", "dtype=float64")
    (code,) = app.glob("*/app.py")
    code.write_text(code.read_text().replace("    return None\n", OWN))
    monkeypatch.setattr(fedsim, "seen", seen := [], raising=False)
    weights = deploy(app, tmp_path / "out")
    simulated = fedsim.simulate("strategy=fedavg", *SMALL, num_rounds=1, dtype="float64", folder=tmp_path / "first")
    assert rows_of(tmp_path / "out")[0]["num_participants"] == NODES
    theirs = load_file(simulated.folder / "model.safetensors")
    assert weights.keys() == theirs.keys()
    assert all(not torch.equal(weights[name], theirs[name]) for name in theirs)
    assert seen == [(0, NODES), (1, NODES), (2, NODES)]


OWN = """
    import numpy as np
    import torch

    import fedsim

    fedsim.seen.append((client, num_clients))
    rng = np.random.default_rng(client)
    x, y = torch.from_numpy(rng.normal(size=(12, 1, 8, 8))), torch.arange(12) % 10
    return Dataset(x, y, {"train": np.arange(10), "test": np.arange(10, 12)}, num_classes=10)
"""


def refused(words):
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):
        assert cli.main(words) == cli.WRONG_INPUT
    return stream.getvalue()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "fedsim export flower my_app run=FOLDER"),
        (["flour", "x"], "did you mean 'flower'"),
        (["flower", "strategy=fedavg"], "needs a folder before strategy=fedavg"),
        (["flower", "x", "attack=sign_flip"], "attack=sign_flip cannot be exported"),
        (["flower", "x", "compressor=top_k"], "compressor=top_k cannot be exported"),
        (["flower", "x", "strategy=centralized"], "strategy=centralized cannot be exported"),
        (["flower", "x", "run=nowhere"], "nowhere is not a run folder"),
    ],
)
def test_what_cannot_be_exported_is_said(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused(["export", *words])
    assert not (tmp_path / "x").exists()


@on_loopback
@pytest.mark.slow
def test_a_deployment_gives_the_simulated_runs_weights(loopback, tmp_path):
    # One SuperLink and its nodes serve both runs: FedLD, a rule of all rows, and FedHyper, which sends rates along.
    loopback.start_nodes()
    for strategy in ("fedld", "fedhyper_g_cl"):
        run = fedsim.simulate(f"strategy={strategy}", *SMALL, num_rounds=2, folder=tmp_path / strategy)
        app, out = exported(tmp_path / f"{strategy}_app", f"run={run.folder}"), tmp_path / f"{strategy}_out"
        run_to_the_end(loopback, app, out, "fraction-evaluate=0.0")
        same(load_file(run.folder / "model.safetensors"), load_file(out / "model.safetensors"), 1e-5)
        assert [(row["num_participants"], row["missing"]) for row in rows_of(out)] == [(NODES, "")] * 2


@on_loopback
@pytest.mark.slow
def test_a_node_that_is_killed_is_named_and_the_run_ends(loopback, tmp_path):
    loopback.start_nodes()
    app, out = exported(tmp_path / "app", *SMALL, "strategy=fedavg", "num_rounds=3"), tmp_path / "out"
    process = loopback.flwr_run(app, config=f'folder="{out}" fraction-evaluate=0.0 timeout=30.0')
    try:
        end = time.monotonic() + 90
        while not rows_of(out):
            assert process.poll() is None, process.communicate()[0] + loopback.said()
            assert time.monotonic() < end, loopback.said()
            time.sleep(0.2)
        loopback.kill("node1")
        while not (out / "model.safetensors").exists():
            assert time.monotonic() < end + 90, loopback.said()
            time.sleep(0.5)
    finally:
        process.kill()
        process.communicate()
    rows = rows_of(out)
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert (rows[0]["num_participants"], rows[0]["missing"]) == (NODES, "")
    assert (rows[-1]["num_participants"], rows[-1]["missing"]) == (NODES - 1, "1")


@on_loopback
@pytest.mark.slow
def test_with_tls_and_authentication_a_node_without_a_key_gets_nothing(tmp_path):
    keys = make_keys(tmp_path)
    server = ["--ssl-ca-certfile", keys["ca"], "--ssl-certfile", keys["cert"], "--ssl-keyfile", keys["key"]]
    place = Loopback(tmp_path / "deployment", [*server, "--enable-supernode-auth"], ["--root-certificates", keys["ca"]])
    connection = [f'root-certificates = "{keys["ca"]}"']
    try:
        app, out = exported(tmp_path / "app", *SMALL, "strategy=fedavg", "num_rounds=1"), tmp_path / "out"
        place.configure(connection)
        place.wait_for("link", "Uvicorn running")
        words = [str(BIN / "flwr"), "supernode", "register", keys["node.pub"], "local"]
        done = subprocess.run(words, env=place.environment, cwd=place.place, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr + place.said()
        tls = ["--root-certificates", keys["ca"]]
        place.start_node(0, "member", [*tls, "--auth-supernode-private-key", keys["node"]])
        place.start_node(1, "no key", [*tls, "--max-retries", "3"])
        place.start_node(
            2, "strange key", [*tls, "--max-retries", "3", "--auth-supernode-private-key", keys["stranger"]]
        )
        run_to_the_end(place, app, out, "min-nodes=1 fraction-evaluate=0.0", connection)
        (row,) = rows_of(out)
        assert (row["num_participants"], row["missing"]) == (1, "")
        assert "Receiving: train message" in place.logs["member"].read_text()
        for name in ("no key", "strange key"):
            said = place.logs[name].read_text()
            assert "Receiving" not in said, said
            assert place.started[name].poll() not in (None, 0) or "denied" in said.lower(), said
    finally:
        place.close()


def make_keys(folder):
    """Write a CA, a certificate of 127.0.0.1 by it, and the keys of two nodes; return name → path."""
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    found = {}

    def write(name, content):
        (folder / name).write_bytes(content)
        found[name] = str(folder / name)

    def new():
        return ec.generate_private_key(ec.SECP384R1())

    def private(key, form):
        return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())

    def certificate(subject, key, issuer, by, *extensions):
        built = (
            x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(now - day).not_valid_after(now + day)
        )  # fmt: skip
        for extension, critical in extensions:
            built = built.add_extension(extension, critical)
        return built.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def name(text):
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    ca, server = new(), new()
    write("ca", certificate(name("ca"), ca, name("ca"), ca, (x509.BasicConstraints(True, None), True)))
    hosts = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")])
    write("cert", certificate(name("127.0.0.1"), server, name("ca"), ca, (hosts, False)))
    write("key", private(server, serialization.PrivateFormat.TraditionalOpenSSL))
    for who in ("node", "stranger"):
        key = new()
        write(who, private(key, serialization.PrivateFormat.OpenSSH))
        form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        write(f"{who}.pub", key.public_key().public_bytes(*form))
    return found
