"""The report page from records made by hand: cells, figures that are left out, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ctrl_dpo import Exponential, policy_of
from ctrl_dpo.measures import plots
from ctrl_dpo.measures.label_plots import label_figure
from ctrl_dpo.measures.planning import frontier_page, frontier_rows, sensitivity_page
from ctrl_dpo.measures.plots import words
from ctrl_dpo.report import (
    attainment_table,
    comparison_table,
    report,
    win_rate_table,
)
from ctrl_dpo.report_inputs import label_summaries


def estimate(value: float, spread: float = 0.05) -> dict[str, object]:
    return {
        "value": value,
        "low": value - spread,
        "high": value + spread,
        "standard_error": spread / 2,
        "per_prompt": [value - 0.1, value + 0.1],
    }


def record(name: str = "ours", **changes) -> dict[str, object]:
    made = {
        "name": name,
        "n_prompts": 2,
        "n_draws": 8,
        "n_reference_draws": 8,
        "tied": 0.01,
        "confidence": 0.95,
        "seed": 0,
        "against": None,
        "prompts_hash": "same",
        "kl": estimate(0.5),
        "length": estimate(12.0),
        "reference_length": estimate(11.0),
        "rewards": estimate(2.0),
        "reference_rewards": estimate(1.0),
        "win_rates": {"best_of_4": estimate(0.75)},
        "attainment": {"best_of_4": estimate(0.8)},
    }
    return made | changes


def test_tables_by_hand():
    table = win_rate_table([record()]).splitlines()
    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == [
        "ours",
        "0.50 (0.45 to 0.55)",
        "75.0% (70.0% to 80.0%)",
        "12.0 (11.9 to 12.1)",
    ]
    assert [cell.strip() for cell in table[3].split("|")[1:4]] == ["reference policy", "0", "50.0%"]
    assert "0.80 (0.75 to 0.85)" in attainment_table([record()])


def test_the_first_policy_is_compared_with_the_others():
    other = record("baseline", win_rates={"best_of_4": estimate(0.6)})
    line = comparison_table([record(), other]).splitlines()[2]
    assert "ours minus baseline" in line
    assert "+15.0%" in line


def test_figures_without_their_numbers_are_left_out(tmp_path):
    unmeasured = record(kl=None, attainment={}, length=None, reference_length=None)
    page = report(tmp_path, [unmeasured]).read_text()
    assert list(tmp_path.glob("*.png")) == []
    assert "## Figures" not in page
    assert "| ours   | -" in page


def test_a_page_with_all_its_figures(tmp_path):
    logs = {"ours": [{"step": 1, "loss": 1.0, "logratios/margins": 0.1}, {"step": 2, "loss": 0.5}]}
    page = report(
        tmp_path,
        [record(), record("baseline")],
        training_logs=logs,
        calibrated_rewards=[[0.1, 0.5], [0.9, 0.4]],
        k=4,
        reference_rewards=[0.0, 1.0, 2.0],
        policy_rewards={"ours": [1.0, 2.0, 3.0]},
        settings={"seed": 0},
    ).read_text()
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"frontier.png", "rewards.png", "calibration.png", "training.png"}
    assert '"seed": 0' in page
    assert "baseline" in page


def test_a_policy_of_no_kl_is_drawn_under_curves_to_a_tenth_of_a_nat(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "frontier_figure", recorder(plots.frontier_figure, drawn))
    untrained = record("untrained", kl=estimate(0.0, 0.0), attainment={"best_of_4": None})
    below = record("below", kl=estimate(-0.04, 0.01), attainment={"best_of_4": None})
    report(tmp_path, [untrained, below])
    (rows, _), figure = drawn
    assert max(row["kl"] for row in rows) == pytest.approx(0.1)
    (axis,) = figure.axes
    assert axis.get_xlim()[0] == pytest.approx(1.15 * -0.05)
    points = [bars.lines[0].get_xdata()[0] for bars in axis.containers]
    assert points == [0.0, -0.04]


@pytest.mark.parametrize(
    "rewards",
    [
        [1.0, 0.9999999999999999],
        [1e16, 1e16 + 2],
        [-1e300, 1e300],
        [-1.7e308, 1.7e308],
        [1.7e308, 1.7e308],
        [0.0, 5e-324],
        [3.0, 3.0],
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error")
def test_rewards_of_any_size_are_drawn(tmp_path, rewards):
    figure = plots.reward_figure(rewards, {"ours": [*rewards, rewards[1]]})
    figure.savefig(tmp_path / "r.png")
    before, after = (bars.get_data().values for bars in figure.axes[0].patches)
    assert before.sum() == pytest.approx(100)
    assert after.sum() == pytest.approx(100)
    title = figure.axes[0].get_title()
    assert f"mean {rewards[0] / 2 + rewards[1] / 2:.3g} before" in title


def test_the_picture_of_rewards_has_the_means_of_the_record(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "reward_figure", recorder(plots.reward_figure, drawn))
    page = report(
        tmp_path, [record()], reference_rewards=[0.0, 5.0], policy_rewards={"ours": [9.0, 9.0]}
    ).read_text()
    (axis,) = drawn[1].axes
    assert axis.get_title() == "ours\nmean 1 before, 2 after"
    assert [line.get_xdata()[0] for line in axis.lines] == [1.0, 2.0]
    assert "means are over prompts" in page


def test_confidence_is_written_with_its_digits(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "frontier_figure", recorder(plots.frontier_figure, drawn))
    page = report(tmp_path, [record(confidence=0.995)]).read_text()
    assert "Brackets hold 99.5% intervals" in page
    assert "ours (99.5% intervals)" in legend(drawn[1])
    records = record(confidence=0.995), record("other")
    with pytest.raises(ValueError, match=r"same confidence; got 0\.995 .* 0\.95 for 'other'"):
        report(tmp_path / "two", records)
    assert not (tmp_path / "two").exists()


def test_names_are_shown_as_they_are(tmp_path):
    names = ["_base", "cost $_$"]
    rows = frontier_rows(["best_of_4"], [0.5])
    log = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    figures = [
        plots.frontier_figure(rows, [record(name) for name in names], "of $_$"),
        plots.reward_figure([0.0, 1.0], {name: [0.5, 2.0] for name in names}),
        plots.training_figure(dict.fromkeys(names, log)),
        plots.training_figure({"_base": log}),
    ]
    for figure in figures:
        figure.savefig(tmp_path / "f.png")
    for figure, suffix in zip(figures, (" (95% intervals)", ", after", ""), strict=False):
        assert {f" _base{suffix}", f"cost $_${suffix}"} <= set(legend(figure))
    assert legend(figures[3]) == [" _base"]


def legend(figure) -> list[str]:
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def test_two_records_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="different names; got 'ours' for numbers 0 and 2"):
        report(tmp_path / "page", [record(), record("other"), record()])
    assert not (tmp_path / "page").exists()


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"must hold at least one record; got \[\]"):
        report(tmp_path, [])


def test_the_exponential_leans_with_the_procedure():
    rows = frontier_rows(["best_of_4", "worst_of_4"], [0.5])
    names = {(row["procedure"], row["transformation"]) for row in rows}
    assert ("best_of_4", "exponential:10.0") in names
    assert ("worst_of_4", "exponential:-10.0") in names
    best = {r["transformation"]: r["win_rate"] for r in rows if r["procedure"] == "best_of_4"}
    assert best["optimal"] == max(best.values()) > 0.5


def test_procedures_in_words():
    assert words("best_of_4") == "best of 4"
    assert words("single_draw") == "one draw"


def test_a_kl_out_of_reach_is_a_dash(tmp_path):
    page = frontier_page("best_of_8", 5.0, tmp_path / "f.png").splitlines()
    cells = {line.split("|")[1].strip(): line.split("|")[2:5] for line in page[2:7]}
    assert [cell.strip() for cell in cells["exponential:10.0"]] != ["-"] * 3
    assert float(cells["optimal"][1]) > float(cells["identity"][1])
    assert cells["optimal"][2].strip() == "5.0000"
    assert (tmp_path / "f.png").stat().st_size > 10_000


def test_the_picture_draws_every_transformation_of_the_table(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "frontier_figure", recorder(plots.frontier_figure, drawn))
    page = frontier_page("worst_of_64", 1.0, tmp_path / "f.png", against="single_draw")
    lines = [line.split("|")[1:3] for line in page.splitlines()[2:7]]
    betas = {name.strip(): float(beta) for name, beta in lines}
    (rows, title), figure = drawn
    assert {row["transformation"] for row in rows} == set(betas)
    assert title.endswith("against one draw of the reference policy")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][-1] == "normal quantile transformation"
    # a beta far below 1 is printed to five digits, so that it can be used
    exponential = Exponential(-10.0)
    reached = policy_of(exponential, betas[str(exponential)], "worst_of_64", "single_draw").kl
    assert reached == pytest.approx(1.0, rel=1e-3)


def recorder(draw, drawn):
    def drawing(rows, records, title):
        figure = draw(rows, records, title)
        drawn.extend([(rows, title), figure])
        return figure

    return drawing


def test_what_planning_refuses(tmp_path):
    with pytest.raises(ValueError, match="^kl must be finite and > 0; got -1"):
        frontier_page("best_of_8", -1.0, tmp_path / "f.png")
    with pytest.raises(ValueError, match="^rate must be finite and > 0; got -5"):
        frontier_page("best_of_8", 1.0, tmp_path / "f.png", rate=-5.0)


def test_serving_as_trained_loses_nothing(tmp_path):
    page = sensitivity_page(["single_draw", "best_of_8"], 1.0, tmp_path / "s.png").splitlines()
    assert page[0].split("|")[2].strip() == "one draw"
    assert "0.8646 (-0.0000)" in page[2]
    assert "0.7106 (-0.1540)" in page[3]
    assert (tmp_path / "s.png").stat().st_size > 10_000


def test_labels_alone_make_a_page(tmp_path):
    made = label_summaries([labelled_folder(tmp_path / "stage")])
    page = report(tmp_path, [], labels=made).read_text()
    assert page.startswith("## Labels of ")
    assert re.search(r"\| tied_share +\| 0.25 ", page)
    assert "histograms" not in page
    assert (tmp_path / "labels0.png").stat().st_size > 10_000
    both = report(tmp_path / "both", [record()], labels=made).read_text()
    assert "## Evaluation" in both
    assert "## Labels of " in both
    with pytest.raises(ValueError, match="must be finished folders of `ctrl-dpo relabel`; got"):
        label_summaries([tmp_path / "absent"])


def labelled_folder(path: Path) -> Path:
    bins = {"edges": [0.0, 0.5, 1.0], "counts": [3, 1]}
    summary = {"rows": 5, "groups": 4, "tied_share": 0.25, "margin_nats": 0.3}
    summary |= {"dropped: prompt must be text": "1, first at rows [2]"}
    summary["histograms"] = {"held_out": bins, "margins": bins}
    path.mkdir()
    (path / "stage.json").write_text(json.dumps({"stage": "relabel", "summary": summary}))
    return path


def test_the_figure_of_labels_draws_their_numbers(tmp_path):
    (summary,) = label_summaries([labelled_folder(tmp_path / "stage")]).values()
    counts, held_out, margins = label_figure("mine", summary).axes
    assert [bar.get_width() for bar in counts.patches] == [5, 4, 1]
    names = [text.get_text() for text in counts.get_yticklabels()]
    assert names == ["rows", "groups", "dropped: prompt must be text"]
    assert held_out.patches[0].get_data().values.tolist() == [75.0, 25.0]
    assert margins.get_title() == "margins, 25.0% of them 0"
    summary["histograms"]["held_out"] = {"edges": [0.0, 1.0], "counts": [0]}
    assert label_figure("mine", summary).axes[1].get_title().endswith("no prompt has two draws")
