"""The model card as Markdown, with the numbers of model_card.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from clsd_tf.methods import method_of
from clsd_tf.metrics.table import METRICS, Metric, definitions, headlines
from clsd_tf.storage.dataset_dir import SPLITS
from clsd_tf.training.config import parse_method
from export.servable.card_types import Measured, ModelCard, Slice


def render_card(card: ModelCard) -> str:
    """Writes a card as Markdown.

    Args:
      card: what a version's model_card.json holds.

    Returns:
      The content of model_card.md. Text of specs and files is escaped.
    """
    sections = (
        ("What it is", _what(card)),
        ("What it is for", _list(_uses(card))),
        ("Limits", _list(_limits(card))),
        ("Data", _data(card)),
        (f"Measured on the {card.split} split", _measured(card)),
        ("Calibration", _calibration(card)),
        ("Training", _training(card)),
        ("Export", _export(card)),
    )
    title = f"# {_text(card.model_name)}, version {card.version}\n"
    return "\n".join([title, *(f"## {heading}\n\n{body}\n" for heading, body in sections)])


def _what(card: ModelCard) -> str:
    config = card.training.config
    method_config = parse_method(config["method"])
    method = method_of(method_config)
    return _list(
        [
            f"`ctr`: the probability of a click, that is of `{_code(card.data.label)}`, for one user and one item.",
            f"Backbone `{_code(config['backbone'])}` with embeddings of {config['embeddings']['dim']} numbers and "
            f"hidden\\_units {', '.join(map(str, config['hidden_units']))}.",
            _text(method.describe(method_config)),
        ]
    )


def _uses(card: ModelCard) -> list[str]:
    return [
        "To rank items for users of the feed whose log it was trained on, and to estimate how likely they are to be "
        "clicked there.",
        "Not for decisions about people, such as on credit, work, housing, insurance, health or prices, nor to find "
        "out what somebody is like.",
        "Not for another feed, population or label, unless it is measured there first.",
    ]


def _limits(card: ModelCard) -> list[str]:
    train, test = card.data.splits["train"], card.data.splits[card.split]
    method_config = parse_method(card.training.config["method"])
    method = method_of(method_config)
    limits = [
        "It knows logged impressions only. What the feed did not show, and how place and earlier rankings moved "
        "clicks, the log does not tell.",
        f"Trained on events from {_day(train.first_event)} to {_day(train.last_event)}, measured on events from "
        f"{_day(test.first_event)} to {_day(test.last_event)}. Users, items and click rates change: watch PCOC on "
        "fresh events, and train again when it leaves 1.",
        "New users and items, and missing values, are scored by what else is known of them.",
    ]
    limits += map(_text, method.limits(method_config))
    if card.data.intensity_label is None:
        limits.append("The data has no label stronger than the click: whether clicks were satisfying is not measured.")
    names = ", ".join(map(_text, card.groups))
    limits.append(
        f"Differences between users are measured for {names} only; groups of fewer than 20 users are part of other."
        if card.groups
        else "No user groups are declared: differences between groups of users are not measured."
    )
    limits.append(
        "Intervals say what other users of the same time could have changed, not another time or another training run."
    )
    return limits


def _data(card: ModelCard) -> str:
    data = card.data
    facts = [
        f"Feature spec `{_code(data.feature_spec)}`, fingerprint `{data.spec_fingerprint}`.",
        f"Dataset `{data.dataset_fingerprint}`, built {data.built_at}.",
        f"Label `{_code(data.label)}`"
        + (f", held-out intensity label `{_code(data.intensity_label)}`." if data.intensity_label else "."),
    ]
    splits = [
        [name, f"{entry.rows:,}", f"{entry.click_rate:.4f}", entry.first_event, entry.last_event]
        for name, entry in ((split, data.splits[split]) for split in SPLITS)
    ]
    inputs = [[entry.table, entry.file, f"{entry.bytes:,}", entry.sha256] for entry in data.inputs]
    return "\n\n".join(
        [
            *([_text(data.description)] if data.description else []),
            _list(facts),
            _table(["split", "rows", "click rate", "first event", "last event"], splits),
            _table(["table", "file", "bytes", "SHA-256"], inputs),
        ]
    )


def _measured(card: ModelCard) -> str:
    shown = [
        metric for metric in headlines(card.overall.metrics) if card.overall.metrics[metric.name].value is not None
    ]
    rows = [_row("overall", card.overall, shown)]
    for group, labels in card.groups.items():
        rows += [_row(f"{group} {label}", entry, shown) for label, entry in labels.items()]
    headings = ["rows of", "rows", "users", *(metric.heading for metric in shown), METRICS["ece"].heading]
    introduction = "As it is served. In brackets: 95 % intervals over users."
    return "\n\n".join([introduction, _table(headings, rows), definitions([*shown, METRICS["ece"]])])


def _row(name: str, entry: Slice, shown: Sequence[Metric]) -> list[str]:
    metrics = [_metric(entry.metrics[metric.name]) for metric in shown]
    return [name, f"{entry.rows:,}", f"{entry.users:,}", *metrics, f"{entry.ece:.4f}"]


def _metric(measured: Measured) -> str:
    if measured.value is None:
        return "-"
    if measured.interval is None:
        return f"{measured.value:.4f}"
    return f"{measured.value:.4f} ({measured.interval[0]:.4f} to {measured.interval[1]:.4f})"


def _calibration(card: ModelCard) -> str:
    found = card.calibration
    if found.method == "none":
        return "None: `ctr` is the model's own output."
    per = f", one curve for each {_text(found.user_group)}" if found.user_group else ""
    shown = headlines(found.after)
    rows = [
        [when, *("-" if (value := entry[metric.name]) is None else f"{value:.4f}" for metric in shown)]
        for when, entry in (("before", found.before), ("after", found.after))
    ]
    return f"`{found.method}`, fitted on the validation split{per}. On the {card.split} split:\n\n" + _table(
        ["", *(metric.heading for metric in shown)], rows
    )


def _training(card: ModelCard) -> str:
    config = json.dumps(card.training.config, indent=1, sort_keys=True)
    parts = [_block("bash", card.training.command)]
    if card.training.earlier_runs:
        rows = [
            [run.work_fingerprint, run.dataset_fingerprint, f"{run.rows:,}", run.first_event, run.last_event]
            for run in card.training.earlier_runs
        ]
        headings = ["run", "dataset", "training rows", "first event", "last event"]
        parts += ["It goes on from these runs, the oldest first:", _table(headings, rows)]
    return "\n\n".join([*parts, "The whole config:", _block("json", config)])


def _export(card: ModelCard) -> str:
    export = card.export
    differences = export.verification.get("max_difference", {})
    facts = [f"Signatures: {', '.join(_signatures(differences))}." if differences else "Not verified."]
    if differences:
        facts.append(f"Largest difference to the training model: {max(differences.values()):.1e}.")
    quantization = export.quantisation
    if quantization is not None:
        facts.append(
            f"Embedding tables in {quantization['tables']}: {quantization['bytes_before']:,} bytes became "
            f"{quantization['bytes_after']:,}, AUC {_number(quantization['auc_before'])} became "
            f"{_number(quantization['auc_after'])}."
        )
    libraries = [[name, version or "from sources"] for name, version in card.libraries.items()]
    profile = json.dumps(export.profile, indent=1, sort_keys=True)
    return f"{_list(facts)}\n\n{_table(['library', 'version'], libraries)}\n\nProfile:\n\n{_block('json', profile)}"


def _signatures(differences: dict[str, float]) -> list[str]:
    """Those that were verified: keys are signature/output."""
    return sorted({key.split("/")[0] for key in differences})


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def _day(time: str) -> str:
    return time[:10]


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _block(language: str, text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _text(value: str) -> str:
    """Text from specs and files, which must not become Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", re.sub(r"\s+", " ", value).strip())


def _code(value: str) -> str:
    return re.sub(r"\s+", " ", value).replace("`", "'")
