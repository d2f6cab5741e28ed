"""Builds Grafana's dashboards with grafana-foundation-sdk: ``python -m cluster.dashboards`` writes them beside this.

Every panel states its unit; series are told apart by what their legend names. ``trainer/metrics.py`` has the metrics.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FOLDER = Path(__file__).parent
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${source}")
GOODPUT = (
    'sum by (run) (rate(moviola_goodput_seconds_total{{cause="productive",run=~"{run}"}}[{window}]))'
    ' / sum by (run) (rate(moviola_goodput_seconds_total{{run=~"{run}"}}[{window}]))'
)
GREEN, YELLOW, ORANGE, RED = "green", "yellow", "orange", "red"
STATES = {"running": GREEN, "stopped": YELLOW, "done": "blue", "failed": RED}
Steps = list[tuple[float | None, str]]


def query(expression: str, legend: str = "", *, instant: bool = False) -> prometheus.Dataquery:
    """One query of a panel."""
    made = prometheus.Dataquery().expr(expression).legend_format(legend).datasource(SOURCE)
    return made.instant() if instant else made.range()


def last(series: str) -> str:
    """What was last heard in the page's range: runs that are over are not scraped any more."""
    return f"last_over_time({series}[$__range])"


def thresholds(steps: Steps) -> builders.ThresholdsConfig:
    """Colours from the values at which they begin; the first begins nowhere."""
    listed = [models.Threshold(value=value, color=colour) for value, colour in steps]
    return builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(listed)


def curves(
    title: str, unit: str, *queries: tuple[str, str], text: str = "", log: bool = False, stacked: bool = False,
    limits: Steps | None = None, span: int = 8,
) -> timeseries.Panel:  # fmt: skip
    """Curves over time, with a legend that names their last values."""
    legend = common.VizLegendOptions().display_mode(options.LegendDisplayMode.LIST).calcs(["lastNotNull"])
    panel = timeseries.Panel().title(title).description(text).unit(unit).datasource(SOURCE).span(span).height(8)
    panel.legend(legend.placement(options.LegendPlacement.BOTTOM).show_legend(True))
    panel.tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI)).line_width(1).span_nulls(60_000)
    if log:  # and linear about zero, where an adversary's losses may be
        scale = common.ScaleDistributionConfig().type(options.ScaleDistribution.SYMLOG).log(10)
        panel.scale_distribution(scale.linear_threshold(1e-4))
    if stacked:
        panel.fill_opacity(60).stacking(common.StackingConfig().mode(options.StackingMode.NORMAL))
    if limits:
        panel.thresholds(thresholds(limits))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(options.GraphTresholdsStyleMode.DASHED))
    for expression, name in queries:
        panel.with_target(query(expression, name))
    return panel


def figure(
    title: str, unit: str, expression: str, legend: str = "", *, text: str = "", limits: Steps | None = None,
    named: bool = False, instant: bool = False, span: int = 3,
) -> stat.Panel:  # fmt: skip
    """One figure; ``named`` shows the series' name in place of its value, ``instant`` asks for the end of the range."""
    panel = stat.Panel().title(title).description(text).unit(unit).datasource(SOURCE).span(span).height(4)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    panel.graph_mode(options.BigValueGraphMode.NONE if instant else options.BigValueGraphMode.AREA)
    panel.text_mode(options.BigValueTextMode.NAME if named else options.BigValueTextMode.VALUE)
    panel.thresholds(thresholds(limits or [(None, GREEN)]))
    return panel.with_target(query(expression, legend, instant=instant))


def bars(title: str, unit: str, expression: str, legend: str, *, text: str = "", span: int = 8) -> bargauge.Panel:
    """A bar for each series."""
    panel = bargauge.Panel().title(title).description(text).unit(unit).datasource(SOURCE).span(span).height(8)
    panel.orientation(options.VizOrientation.HORIZONTAL).thresholds(thresholds([(None, "blue")]))
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    return panel.with_target(query(expression, legend))


def of_run(name: str, labels: str = "") -> str:
    """A metric of the chosen run."""
    return f'moviola_{name}{{run="$run"{"," if labels else ""}{labels}}}'


def of_rank(name: str, labels: str = "") -> str:
    """A metric of the chosen ranks of the chosen run."""
    return of_run(name, f'rank=~"$rank"{"," if labels else ""}{labels}')


def variable(name: str, label: str, expression: str) -> builders.QueryVariable:
    """A variable whose values Prometheus knows."""
    made = builders.QueryVariable(name).label(label).datasource(SOURCE).query(expression)
    return made.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.NUMERICAL_ASC)


def page(uid: str, title: str, text: str) -> builders.Dashboard:
    """An empty dashboard of this family, with a link to the others."""
    made = builders.Dashboard(title).uid(uid).description(text).tags(["moviola"]).refresh("30s").time("now-3h", "now")
    made.timezone("browser").readonly().tooltip(models.DashboardCursorSync.CROSSHAIR)
    made.with_variable(builders.DatasourceVariable("source").label("Prometheus").type("prometheus"))
    pages = builders.DashboardLink("Moviola").type(models.DashboardLinkType.DASHBOARDS).tags(["moviola"])
    return made.link(pages.as_dropdown(True).keep_time(True).include_vars(True))


def of_one_run(made: builders.Dashboard) -> builders.Dashboard:
    """Adds the variables of one run, links to its report and log, and its restarts and stages as annotations."""
    made.with_variable(variable("run", "Run", "label_values(moviola_run_info, run)"))
    ranks = variable("rank", "Rank", 'label_values(moviola_rank_step{run="$run"}, rank)')
    made.with_variable(ranks.multi(True).include_all(True).all_value(".*"))
    address = variable("address", "Address", 'label_values(moviola_run_info{run="$run"}, address)')
    made.with_variable(address.hide(models.VariableHide.HIDE_VARIABLE))
    for title, path in (("Report", "report"), ("Log", "events")):
        link = builders.DashboardLink(title).type(models.DashboardLinkType.LINK)
        made.link(link.url(f"http://${{address}}/{path}").icon("external link").target_blank(True).tooltip(
            f"The run's {title.lower()}, from its own address: reachable where telemetry.bind lets it be"
        ))  # fmt: skip
    notes = {
        "Restarts": (RED, f"sum by (cause) ({of_run('restarts_total')} - {of_run('restarts_total')} offset 1m) > 0"),
        "Stages": ("blue", f"{of_run('stage')} == 1 unless {of_run('stage')} offset 1m == 1"),
    }
    for name, (colour, expression) in notes.items():
        note = builders.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(colour)
        made.annotation(note.expr(expression))
    return made


MARKS = {"Restarts": "restart: {{cause}}", "Stages": "stage {{stage}}"}
"""What a mark of these annotations says."""


def run() -> builders.Dashboard:
    """Is it learning, is it fast, is it healthy?"""
    made = of_one_run(page("moviola-run", "Moviola: a run", "Is it learning, is it fast, is it healthy?"))
    rate = "[$__rate_interval]"

    made.with_row(builders.Row("At a glance"))
    state = figure("State", "none", f"{last(of_run('run_state'))} == 1", "{{state}}", named=True, instant=True)
    for name, colour in STATES.items():
        shade = {"mode": "fixed", "fixedColor": colour}
        state.override_by_name(name, [models.DynamicConfigValue(id_val="color", value=shade)])
    made.with_panel(state)
    stage = f"{last(of_run('stage'))} == 1"
    made.with_panel(figure("Stage", "none", stage, "{{stage}}", named=True, instant=True))
    share = f"{of_run('step')} / {of_run('planned_steps')}"
    made.with_panel(figure("Done", "percentunit", share, text="Steps that the weights have had, of those planned."))
    made.with_panel(figure("Time left", "s", of_run("remaining_seconds"), text="At the present speed."))
    made.with_panel(figure(
        "Goodput", "percentunit", GOODPUT.format(run="$run", window="1h"),
        text="Share of the last hour that went into the weights.",
        limits=[(None, RED), (0.7, ORANGE), (0.9, GREEN)],
    ))  # fmt: skip
    made.with_panel(figure(
        "Newest checkpoint", "s", f"time() - {of_run('last_commit_timestamp_seconds')}", text="Its age.",
        limits=[(None, GREEN), (1800, ORANGE), (3600, RED)],
    ))  # fmt: skip
    restarts = f"sum({of_run('restarts_total')})"
    made.with_panel(figure("Restarts", "none", restarts, limits=[(None, GREEN), (1, YELLOW), (10, RED)]))
    made.with_panel(figure("Workers", "none", of_run("workers")))

    made.with_row(builders.Row("Is it learning?"))
    made.with_panel(curves("Loss", "short", (of_run("loss"), "{{term}}"), log=True, text="The loss and its terms."))
    made.with_panel(curves(
        "Evaluation: PSNR", "dB", (of_run("evaluation_psnr_db"), "{{method}}"),
        text="On clips that are never trained on, beside baselines that spend as many numbers as the latent.",
    ))  # fmt: skip
    made.with_panel(curves(
        "Evaluation: SSIM and LPIPS", "none", (of_run("evaluation_ssim"), "SSIM {{method}}"),
        (of_run("evaluation_lpips"), "LPIPS {{method}} ({{backbone}})"), text="SSIM: more is better; LPIPS: less is.",
    ))  # fmt: skip
    made.with_panel(curves("Gradient norm", "short", (of_run("gradient_norm"), "before clipping"), log=True))
    made.with_panel(curves("Learning rate", "sci", (of_run("learning_rate"), "learning rate")))
    made.with_panel(curves("Of a step", "short", (of_run("statistic"), "{{statistic}}"), text="The recipe's own."))
    made.with_panel(curves(
        "Adversary: logits", "short", (of_run("adversary_logit"), "{{side}}"),
        text="Real and fake apart: the adversary wins. On top of each other: it has lost.", span=8,
    ))  # fmt: skip
    made.with_panel(curves("Adversary: weight", "short", (of_run("adversary_weight"), "weight"), log=True))
    made.with_panel(curves(
        "Latent", "short", (of_run("latent_kl"), "KL"), (of_run("latent_length"), "tokens of a clip in use"),
    ))  # fmt: skip

    made.with_row(builders.Row("Is it fast?"))
    made.with_panel(curves("Speed", "short", (of_run("clips_per_second"), "clips a second")))
    buckets = f"sum by (le) (rate({of_run('step_seconds_bucket')}{rate}))"
    quantiles = [(f"histogram_quantile({q}, {buckets})", f"{q:.0%}") for q in (0.5, 0.95, 0.99)]
    made.with_panel(curves("Time of a step", "s", *quantiles, text="Quantiles; data wait is not in it."))
    flops = f"rate({of_run('flops_total')}{rate})"
    made.with_panel(curves("Achieved", "flops", (flops, "all"), text="FLOP/s in convolutions, products, attention."))
    made.with_panel(curves("Step by rank", "s", (of_rank("rank_step_seconds"), "rank {{rank}}")))
    made.with_panel(curves("Data wait by rank", "s", (of_rank("rank_data_wait_seconds"), "rank {{rank}}")))
    made.with_panel(curves("Memory by rank", "bytes", (of_rank("memory_bytes"), "{{kind}} {{rank}}")))

    made.with_row(builders.Row("Is it healthy?"))
    causes = f"sum by (cause) (rate({of_run('goodput_seconds_total')}{rate}))"
    made.with_panel(
        curves("Where time goes", "percentunit", (causes, "{{cause}}"), stacked=True, text="Seconds a second.")
    )
    made.with_panel(bars("Where all of it went", "s", of_run("goodput_seconds_total"), "{{cause}}"))
    made.with_panel(
        curves("Restarts by cause", "none", (of_run("restarts_total"), "{{cause}}"), text="Since the run's start.")
    )
    made.with_panel(curves(
        "Checkpoint", "s", (of_run("checkpoint_phase_seconds"), "{{phase}}"), stacked=True,
        text="What the newest one took, behind training.",
    ))  # fmt: skip
    made.with_panel(curves("Checkpoint size", "bytes", (of_run("last_commit_bytes"), "the newest one")))
    made.with_panel(curves(
        "At stake", "s", (of_run("uncommitted_seconds"), "seconds of training that no checkpoint holds"),
        limits=[(None, GREEN), (1800, RED)],
    ))  # fmt: skip
    return made


def data() -> builders.Dashboard:
    """Does the data keep up, and is it sound?"""
    made = of_one_run(page("moviola-data", "Moviola: data", "Does the data of a run keep up, and is it sound?"))
    rate = "[$__rate_interval]"
    made.with_row(builders.Row("Does it keep up?"))
    clips = f"rate({of_run('clips_total')}{rate})"
    made.with_panel(curves("Clips", "short", (clips, "clips a second")))
    made.with_panel(curves("Frames", "short", (f"rate({of_run('frames_total')}{rate})", "frames a second")))
    made.with_panel(curves("From storage", "Bps", (f"rate({of_run('read_bytes_total')}{rate})", "all ranks")))
    waited = f"rate({of_run('data_wait_seconds_total')}{rate}) / on (run) {of_run('workers')}"
    made.with_panel(curves(
        "Waiting for data", "percentunit", (waited, "share of the ranks' time"),
        limits=[(None, GREEN), (0.05, ORANGE), (0.2, RED)],
    ))  # fmt: skip
    made.with_panel(curves("Read ahead", "short", (of_rank("read_ahead_clips"), "rank {{rank}}"), text="Clips."))
    made.with_panel(curves("Memory of the read-ahead", "bytes", (of_rank("read_ahead_bytes"), "rank {{rank}}")))
    made.with_panel(curves("Requests under way", "short", (of_rank("read_ahead_requests"), "rank {{rank}}")))
    made.with_row(builders.Row("Is it sound?"))
    skipped = f"sum by (reason) (increase({of_run('skipped_clips_total')}{rate}))"
    made.with_panel(curves("Skipped", "short", (skipped, "{{reason}}"), stacked=True, text="Clips, by reason."))
    made.with_panel(curves(
        "Skips over the budget", "percentunit", (of_rank("skip_budget_ratio"), "rank {{rank}}"),
        text="At 100% the run ends.", limits=[(None, GREEN), (0.8, RED)],
    ))  # fmt: skip
    made.with_panel(curves("Retries", "short", (f"rate({of_run('storage_retries_total')}{rate})", "requests a second")))
    made.with_panel(curves("Passes over the data", "short", (of_run("epoch"), "{{dataset}}")))
    size = f"increase({of_run('read_bytes_total')}[1h]) / increase({of_run('clips_total')}[1h])"
    made.with_panel(curves("Bytes a clip", "bytes", (size, "read for each clip that is trained on")))
    made.with_panel(bars("Skipped in all", "short", of_run("skipped_clips_total"), "{{reason}}"))
    return made


def fleet() -> builders.Dashboard:
    """All runs: state, goodput, restarts, cost."""
    made = page("moviola-fleet", "Moviola: all runs", "State, progress, goodput, restarts and cost of all runs.")
    runs = variable("run", "Run", "label_values(moviola_run_info, run)")
    made.with_variable(runs.multi(True).include_all(True).all_value(".*"))
    price = builders.TextBoxVariable("price").label("Price of a worker-hour").default_value("1")
    made.with_variable(price)
    some = 'run=~"$run"'

    def of(name: str, labels: str = some) -> str:
        return last(f"moviola_{name}{{{labels}}}")

    hours = f"sum by (run) ({of('rank_seconds_total')}) / 3600"
    for state, colour in STATES.items():
        count = of("run_state", f'state="{state}",{some}')
        limits: Steps = [(None, "text"), (1, colour)]
        made.with_panel(figure(state.capitalize(), "none", f"sum({count})", limits=limits, instant=True))
    made.with_panel(figure("Restarts", "none", f"sum({of('restarts_total')})", instant=True))
    made.with_panel(figure("Workers", "none", f"sum(moviola_workers{{{some}}})"))
    made.with_panel(figure("Worker-hours", "h", f"sum({hours})", instant=True))
    made.with_panel(figure("Cost", "none", f"sum({hours}) * $price", instant=True))

    loss, psnr = of("loss", 'term="loss",' + some), of("evaluation_psnr_db", 'method="model",' + some)
    columns = [
        ("state", f"max by (run, state) ({of('run_state')} == 1)"),
        ("done", f"max by (run) ({of('step')} / {of('planned_steps')})"),
        ("loss", f"max by (run) ({loss})"),
        ("PSNR", f"max by (run) ({psnr})"),
        ("goodput", GOODPUT.format(run="$run", window="$__range")),
        ("restarts", f"sum by (run) ({of('restarts_total')})"),
        ("cost", f"{hours} * $price"),
    ]
    rows = table.Panel().title("Runs").datasource(SOURCE).span(24).height(9).show_header(True)
    names = {"state": "State", "run": "Run"}
    for reference, (name, expression) in zip("ABCDEFG", columns, strict=True):
        rows.with_target(query(expression, instant=True).format(PromQueryFormat.TABLE).ref_id(reference))
        names[f"Value #{reference}"] = name
    rows.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    tidy = {"excludeByName": {"Time": True, "Value #A": True}, "renameByName": names}
    rows.with_transformation(models.DataTransformerConfig(id_val="organize", options=tidy))
    units = {"done": "percentunit", "goodput": "percentunit", "PSNR": "dB"}
    for name, unit in units.items():
        rows.override_by_name(name, [models.DynamicConfigValue(id_val="unit", value=unit)])
    link = {"title": "Open the run", "url": "/d/moviola-run?var-run=${__data.fields.Run}"}
    rows.override_by_name("Run", [models.DynamicConfigValue(id_val="links", value=[link])])
    made.with_panel(rows.unit("short"))

    goodput = GOODPUT.format(run="$run", window="$__rate_interval")
    low: Steps = [(None, RED), (0.7, GREEN)]
    made.with_panel(curves("Goodput", "percentunit", (goodput, "{{run}}"), limits=low, span=12))
    made.with_panel(
        curves("Speed", "short", (f"moviola_clips_per_second{{{some}}}", "{{run}}"), text="Clips a second.", span=12)
    )
    cost = f"sum by (run) (moviola_rank_seconds_total{{{some}}}) / 3600 * $price"
    lost = f'sum by (run) (increase(moviola_goodput_seconds_total{{cause=~"lost|recovery.*",{some}}}[1h]))'
    made.with_panel(curves("Lost and recovering", "s", (lost, "{{run}}"), text="Seconds of the last hour.", span=12))
    made.with_panel(curves("Cost by run", "short", (cost, "{{run}}"), span=12))
    return made


PAGES = {"run": run, "fleet": fleet, "data": data}


def render(name: str) -> str:
    """The file of a dashboard."""
    plain: Any = json.loads(JSONEncoder(sort_keys=True).encode(PAGES[name]().build()))
    del plain["style"]  # Grafana 10's; dropped since, as are the variables' numbers
    for each in plain["templating"]["list"]:
        del each["id"]
    for note in plain.get("annotations", {}).get("list", ()):
        note["titleFormat"] = MARKS[note["name"]]  # the builder has no word for it
    for number, panel in enumerate(plain["panels"], 1):
        panel["id"] = number
    return json.dumps(plain, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    for name in PAGES:
        (FOLDER / f"{name}.json").write_text(render(name))
