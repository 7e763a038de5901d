"""The files that `fedsim export flower` writes; `<name>`, `<clients>` … are filled in."""

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "<project>"
version = "0.1.0"
description = "<choices>, a run of fedsim"
license = "Apache-2.0"
dependencies = ["fedsim>=<version>"]

[tool.hatch.build.targets.wheel]
packages = ["<name>"]

[tool.flwr.app]
publisher = "me"

[tool.flwr.app.components]
serverapp = "<name>.app:server"
clientapp = "<name>.app:client"

[tool.flwr.app.config]
num-rounds = <rounds>
min-nodes = <clients>          # nodes that must be there before the first round
fraction = <fraction>            # of the connected nodes that train in a round, in (0, 1]
fraction-evaluate = 1.0   # of them that measure the new model on their own test samples, in [0, 1]
timeout = 3600.0          # seconds that a round waits for its nodes
folder = ""               # for rounds.jsonl and model.safetensors; "": flower-RUN where the ServerApp runs
"""

APP = '''\
"""The run of `run.json` as a Flower app."""

from pathlib import Path

from fedsim.contracts import Dataset
from fedsim.deploy import client_of, server_of

RUN = Path(__file__).with_name("run.json")


def data(client: int, num_clients: int) -> Dataset | None:
    """Return this node's own data, with the splits "train" and "test".

    None: this client's part of the run's data, as in the simulation.
    """
    return None


server = server_of(RUN)
client = client_of(RUN, data)
'''

README = """\
# <project>

<choices>: the rule and the clients of a run of fedsim, as a Flower app for <clients> nodes. A node trains what the
simulation trains for the client of its `partition-id`; `data` in `<name>/app.py` gives it data of its own.

On one machine (`flwr run` needs `[superlink.local]`, `address = "127.0.0.1:9091"` and `insecure = true` in Flower's
`config.toml`):

```
flower-superlink --insecure --disable-runtime-dependency-installation --port 9091
flower-supernode --insecure --superlink 127.0.0.1:9091 --port 9094 \\
    --node-config "partition-id=0 num-partitions=<clients>"
flwr run . local --stream
```

with a SuperNode for each of the <clients> clients, each with its own `--port` and `partition-id`. The server writes
`rounds.jsonl`, whose column `missing` names the clients that did not answer, and `model.safetensors`.
"""
