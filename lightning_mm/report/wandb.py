"""Weights & Biases, as a guest: it may watch a run, and can neither stop it nor hold it up.

Data flow: the Trainer logs metrics under the keys of ``metric_names``; the command line adds census, decisions and
samples; all goes to W&B's own process, or to files in ``<run directory>/wandb`` that ``wandb sync`` uploads later.
Whether W&B is online, offline or off is found without a question at the terminal; each change of what was asked is a
decision. The first fault is logged once, and from then on every call does nothing: the local report needs none of this.
"""

import logging
import netrc
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from lightning_mm.core import metric_names
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.io import read_json
from lightning_mm.core.layer_table import LayerRow, read_layers
from lightning_mm.core.run_directory import RunDirectory
from lightning_mm.report.tables.panels import TrainedLayers

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

Mode = Literal["auto", "online", "offline", "off"]
T = TypeVar("T")
log = logging.getLogger("lightning_mm")

COMPARISON = "layer_comparison"
"""The table of all measures by step, layer and site."""
_STEP = "trainer/global_step"
_START_SECONDS, _FINISH_SECONDS, _MOST_SAMPLES = 20, 60, 64


def resolve(asked: Mode) -> Mode:
    """What the mode comes to on this machine; every change of what was asked is a decision with its reason."""
    if asked == "off":
        return asked
    if find_spec("wandb") is None:
        log_decision("wandb.mode", "off", "wandb is not installed (pip install wandb)")
        return "off"
    standing = {"disabled": "off", "offline": "offline", "dryrun": "offline"}.get(os.environ.get("WANDB_MODE", ""))
    if asked == "auto" and standing is not None:
        log_decision("wandb.mode", standing, f"WANDB_MODE is {os.environ['WANDB_MODE']}")
        return "off" if standing == "off" else "offline"
    login = _login() if asked in ("auto", "online") else ""
    if login and asked == "auto":
        log_decision("wandb.mode", "online", f"logged in by {login}")
    if asked != "offline" and not login:
        log_decision("wandb.mode", "offline", "not logged in; after `wandb login`, `wandb sync` uploads the run")
    return "online" if login else "offline"


def _login() -> str:
    """Where a W&B login is found, or nothing. Only looked for here: W&B itself would ask at the terminal, and wait."""
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(variable):
            return variable
    import wandb

    settings = wandb.setup().settings
    if settings.api_key:
        return "W&B's settings file"
    servers = (urlsplit(settings.base_url).netloc, "api.wandb.ai")  # a login from before the server moved still counts
    files = (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")
    for file in (Path(name).expanduser() for name in files if name):
        try:
            entries = netrc.netrc(file)
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
        if any(entries.authenticators(server) for server in servers):
            return str(file)
    return ""


class OnlineLogger(Logger):
    """A Lightning logger around ``WandbLogger`` that a run never depends on.

    Args:
        save_dir: The run directory; W&B keeps its files in ``wandb/`` below it.
        mode: ``auto`` is online where W&B is logged in and offline elsewhere; ``off`` does nothing.
        run_id: The id of the run at W&B. A run that goes on in its folder is the same one there, too. None lets W&B
            draw one.
        name: What the run is called at W&B.
        project: The W&B project; None (default): WANDB_PROJECT, or ``lightning_mm``.
    """

    def __init__(
        self,
        save_dir: str | Path,
        *,
        mode: Mode = "auto",
        run_id: str | None = None,
        name: str | None = None,
        project: str | None = None,
    ) -> None:
        super().__init__()
        self._directory = Path(save_dir)
        self._run_id, self._name = run_id, name
        self._project = project or os.environ.get("WANDB_PROJECT") or "lightning_mm"
        self._asked = mode
        self._mode: Mode | None = None
        self._wandb: WandbLogger | None = None
        self._defined: set[str] = set()
        self._tables: dict[str, Any] = {}

    @property
    def name(self) -> str | None:
        return self._name

    @property
    def version(self) -> str | None:
        return self._run_id

    @property
    def save_dir(self) -> str:
        return str(self._directory)

    @property
    def mode(self) -> Mode:
        """What ``auto`` came to; ``off`` too after a fault."""
        if self._mode is None:
            self._mode = self._caught("be looked for", lambda: resolve(self._asked)) or "off"
        return self._mode

    @property
    def experiment(self) -> Any:
        """The W&B run, for what this class does not cover; None where W&B is off, and on ranks other than 0."""
        return self._guarded("start", lambda wandb: wandb.experiment)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log values at a step of the Trainer. W&B's own step is left alone: setting it drops points after a resume."""
        self._guarded("log metrics", lambda wandb: self._log_metrics(wandb, metrics, step))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self._guarded("log the configuration", lambda wandb: wandb.log_hyperparams(_nested(params)))

    def summarise(self, **facts: object) -> None:
        """Put facts of the whole run (census, decisions, evaluation) into its summary.

        Args:
            facts: JSON-like values by key.
        """
        self._guarded("write the summary", lambda wandb: wandb.experiment.summary.update(facts))

    def log_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show samples.json as one small table, once, at the end.

        Args:
            rows: The rows of samples.json; their pictures are paths inside the run directory.
        """
        self._guarded("log samples", lambda wandb: self._log_samples(wandb, rows))

    def log_layers(self, rows: Iterable[LayerRow | Mapping[str, Any]]) -> None:
        """Show what one inspection found: a table per quantity that grows, and a heat map over all inspections.

        Args:
            rows: The rows of this inspection, which ``layers.csv`` may hold already; it tells the earlier ones.
        """
        self._guarded("log the layers", lambda wandb: self._log_layers(wandb, rows))

    def log_comparison(self, policy: str) -> None:
        """Show all of layers.csv as one table by step, layer and site, once, at the end; runs are compared by it.

        Args:
            policy: The run's policy with its layers, a column of the table.
        """
        self._guarded("log the table of layers", lambda wandb: self._log_comparison(wandb, policy))

    def close(self, failed: bool = False) -> None:
        """End the W&B run: wait a minute at most for the upload; what is left stays on disk for ``wandb sync``."""
        if self._wandb is not None:
            self._guarded("finish", lambda wandb: wandb.experiment.finish(exit_code=int(failed)))
        self._wandb, self._mode = None, "off"

    def _guarded(self, action: str, call: "Callable[[WandbLogger], T]") -> T | None:
        """Call W&B where it is on, on rank 0, starting it at the first call."""
        if not _first_rank() or self.mode == "off":
            return None
        return self._caught(action, lambda: call(self._started()))

    def _caught(self, action: str, call: Callable[[], T]) -> T | None:
        """The one guard: the first fault turns W&B off for good, with one warning."""
        try:
            return call()
        except Exception as fault:  # whatever a guest raises must never stop a run; it is said once
            self._mode = "off"
            log.warning("W&B could not %s and is now off; the local report is complete. %s", action, _brief(fault))
            return None

    def _started(self) -> "WandbLogger":
        if self._wandb is None:
            self._wandb = self._start()
        return self._wandb

    def _start(self) -> "WandbLogger":
        import wandb  # late: it takes a second, and only runs that use it should pay
        from lightning.pytorch.loggers import WandbLogger

        self._directory.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=self._project,
            name=self._name,
            id=self._run_id,
            resume="allow",
            dir=self._directory,
            mode="online" if self.mode == "online" else "offline",
            reinit="create_new",  # ours alone, whatever else in this process uses W&B
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=_START_SECONDS, finish_timeout=_FINISH_SECONDS
            ),
        )
        run.define_metric(_STEP)
        run.define_metric("*", step_metric=_STEP, step_sync=True)
        self._run_id = run.id
        return WandbLogger(experiment=run, log_model=False)

    def _log_metrics(self, wandb: "WandbLogger", metrics: Mapping[str, float], step: int | None) -> None:
        for key in metrics.keys() - self._defined:
            metric = metric_names.lookup(key)
            if metric is not None and "*" not in key:  # a star would be read as a pattern
                path = key.replace("\\", "\\\\").replace(".", "\\.")  # a bare dot would mean a nested key
                wandb.experiment.define_metric(path, step_metric=_STEP, summary=metric.summary, hidden=metric.hidden)
            self._defined.add(key)
        wandb.log_metrics(dict(metrics), step)

    def _log_samples(self, wandb_logger: "WandbLogger", rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        columns = ["id", "type", "question", "truth", "before", "after", "correct_before", "correct_after"]
        table = wandb.Table(columns=["picture", *columns])
        for row in rows[:_MOST_SAMPLES]:
            pictures = [self._directory / str(name) for name in row.get("images") or []]
            picture = wandb.Image(str(pictures[0])) if pictures and pictures[0].is_file() else None
            table.add_data(picture, *(row.get(column) for column in columns))
        wandb_logger.experiment.log({"samples": table})

    def _log_comparison(self, wandb_logger: "WandbLogger", policy: str) -> None:
        import wandb

        from lightning_mm.report import wandb_layers

        run = RunDirectory(self._directory)
        rows = read_layers(run.layers)[0] if run.layers.exists() else []
        if not rows:
            return
        trained = TrainedLayers.of(read_json(run.census)) if run.census.exists() else TrainedLayers()
        columns, data = wandb_layers.comparison(self._name or run.name, policy, rows, trained)
        wandb_logger.experiment.log({COMPARISON: wandb.Table(columns=list(columns), data=data)})

    def _log_layers(self, wandb_logger: "WandbLogger", found: Iterable[LayerRow | Mapping[str, Any]]) -> None:
        rows = [row if isinstance(row, LayerRow) else LayerRow(**row) for row in found]
        if not rows:  # the first inspection may only keep what later ones are compared with
            return
        import wandb

        from lightning_mm.report import wandb_layers  # late: altair takes half a second to import

        logged: dict[str, Any] = {}
        for key, added in wandb_layers.tables(rows).items():
            if (
                key not in self._tables
            ):  # an immutable table that is logged again does nothing; this one sends what is new
                self._tables[key] = wandb.Table(columns=list(wandb_layers.COLUMNS), log_mode="INCREMENTAL")
            for row in added:
                self._tables[key].add_data(*row)
            logged[key] = self._tables[key]
        shown = wandb_layers.pictures(self._directory, rows)
        logged |= {key: wandb.Image(picture) for key, picture in shown.items()}
        wandb_logger.experiment.log(logged | {_STEP: max(row.step for row in rows)})


def _nested(params: dict[str, Any] | Namespace) -> dict[str, Any]:
    """Dotted names as dictionaries within dictionaries, by which W&B filters and groups runs."""
    nested: dict[str, Any] = {}
    for name, value in (vars(params) if isinstance(params, Namespace) else params).items():
        *path, last = name.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return nested


@rank_zero_only
def _first_rank() -> bool:
    return True


def _brief(fault: Exception) -> str:
    return f"{type(fault).__name__}: {str(fault).strip().splitlines()[0] if str(fault).strip() else 'no message'}"
