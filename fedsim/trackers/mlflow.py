"""MLflow: a run with its config as parameters and its figures as metrics, in a local store."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.console import Row
from fedsim.errors import UserError
from fedsim.trackers import Tracker, flat_config, measured, need

_FOLDER = "fedsim.folder"  # tag by which a resumed run finds its entry again
_MOST = 100  # parameters, and 1000 metrics, are what MLflow takes in one call
_LONGEST = 500  # characters of a parameter in every version of MLflow's store


class MLflow(Tracker):
    """Logs to MLflow through its client, without its global state.

    Args:
        uri: of the store; a database of one file here by default, which `mlflow ui --backend-store-uri` shows.
        experiment: name of the experiment, made if there is none.

    Raises:
        UserError: the package mlflow is not installed, or refuses the store.

    """

    def __init__(self, uri: str = "sqlite:///mlflow.db", experiment: str = "fedsim") -> None:
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise need("mlflow", "mlflow", "mlflow") from error
        try:
            self._client: Any = MlflowClient(tracking_uri=uri)
        except MlflowException as error:
            raise UserError(f"tracker.uri={uri} is refused by MLflow: {error}") from error
        self._metric, self._param = Metric, Param
        self._experiment, self._run = experiment, ""

    def open(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Make the run, or find it again."""
        client, name = self._client, str(folder.resolve())
        found = client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else client.create_experiment(self._experiment)
        quoted = name.replace("'", "\\'")
        earlier = client.search_runs([experiment], filter_string=f"tags.`{_FOLDER}` = '{quoted}'", max_results=1)
        if earlier:
            self._run = earlier[0].info.run_id
            client.update_run(self._run, status="RUNNING")
            return
        self._run = client.create_run(experiment, tags={_FOLDER: name}, run_name=folder.name).info.run_id
        params = [self._param(key, str(value)[:_LONGEST]) for key, value in flat_config(config).items()]
        for first in range(0, len(params), _MOST):
            client.log_batch(self._run, params=params[first : first + _MOST])

    def round(self, row: Row) -> None:
        """Log the figures of a round in one call."""
        self._log(measured(row), int(row["round"]))

    def finish(self, summary: Row) -> None:
        """Log the results under `final.`."""
        self._log({f"final.{name}": value for name, value in measured(summary).items()}, 0)

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self._run, metrics=[self._metric(n, v, now, step) for n, v in figures.items()])

    def close(self, error: BaseException | None) -> None:
        """End the run as finished, killed or failed."""
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        self._client.set_terminated(self._run, status=status)
