"""Models and versions of the local server: which are served, how they change, and what broken ones do not disturb."""

import contextlib
import pathlib
import shutil
import threading

import grpc
import pytest
import tensorflow as tf
from grpc_calls import model_spec, outputs, predict_request, prediction_stub, slow_request, wait_until
from tensorflow_serving.apis import get_model_status_pb2, input_pb2, prediction_log_pb2
from tiny_servables import example, examples, save_tiny, write_config

from clsd_tf.serving.servable import version_directory
from export.contract_rules.version import Base
from export.publishing.versions import ModelVersions
from export.servable.warmup import WARMUP_FILE
from export.server.aspired_versions import read_aspired_versions
from export.server.errors import RequestError
from export.server.loaded_version import LoadedVersion
from export.server.local_server import LocalServer
from export.server.version_manager import VersionManager
from export.server.warmup_replay import replay_warmup_requests

State = get_model_status_pb2.ModelVersionStatus.State


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Versions 1, 2 and 3 of a model, which multiply by their number."""
    path = tmp_path_factory.mktemp("versions")
    for number in (1, 2, 3):
        save_tiny(path, "tiny", number, scale=float(number))
    return path / "tiny"


@pytest.fixture
def publish(versions, tmp_path):
    """Publishes a version by one rename."""

    def publish_version(number, name="tiny"):
        staging = tmp_path / name / ".staging"
        shutil.copytree(versions / str(number), staging)
        return staging.rename(tmp_path / name / str(number))

    return publish_version


@pytest.fixture
def manager(tmp_path):
    return VersionManager(tmp_path, LoadedVersion)


ENTRY = 'config { name: "tiny" base_path: "/models/tiny" model_platform: "tensorflow" }'


def config(policy="", labels="", name="tiny", base_path="/models/tiny"):
    return (
        f'model_config_list {{ config {{ name: "{name}" base_path: "{base_path}" model_platform: "tensorflow" '
        f"model_version_policy {{ {policy} }} {labels} }} }}"
    )


def label(key, value):
    return f'version_labels {{ key: "{key}" value: {value} }}'


def number_of(manager, **version):
    with manager.lease(model_spec("tiny", **version)) as loaded:
        return loaded.version


def states(manager, name="tiny"):
    return {number: state.state for number, state in manager.states(model_spec(name)).items()}


def damage(path):
    (path / "saved_model.pb").write_bytes(b"no SavedModel")


def test_without_a_config_the_newest_version_of_every_directory_is_served(manager, publish, tmp_path):
    publish(1), publish(2), publish(3, name="other")
    (tmp_path / "tiny" / "v9").mkdir()
    (tmp_path / "tiny" / "10.incomplete").mkdir()
    (tmp_path / "tiny" / "²").mkdir()
    (tmp_path / "tiny" / ("9" * 30)).mkdir()
    (tmp_path / "empty").mkdir()

    manager.poll()

    assert manager.versions() == {"tiny": [2], "other": [3]}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("", [3]),
        ("latest { num_versions: 2 }", [2, 3]),
        ("all {}", [1, 2, 3]),
        ("specific { versions: 1 versions: 3 }", [1, 3]),
        ("specific { versions: 2 versions: 9 }", [2]),
    ],
)
def test_the_policy_chooses_versions(manager, publish, tmp_path, policy, expected):
    publish(1), publish(2), publish(3)
    write_config(tmp_path, config(policy))

    manager.poll()

    assert manager.versions() == {"tiny": expected}
    assert number_of(manager) == expected[-1]
    for number in expected:
        assert number_of(manager, version=number) == number


def test_a_config_finds_the_model_beside_it_whatever_the_container_path(manager, publish, tmp_path):
    publish(1)
    write_config(tmp_path, config(name="renamed", base_path="/some/where/tiny/"))
    manager.poll()
    assert manager.versions() == {"renamed": [1]}


def test_labels_follow_the_config(manager, publish, tmp_path):
    publish(1), publish(2)
    write_config(tmp_path, config("all {}", label("stable", 1) + label("canary", 2)))
    manager.poll()
    assert (number_of(manager, label="stable"), number_of(manager, label="canary")) == (1, 2)

    write_config(tmp_path, config("all {}", label("stable", 2)))
    manager.poll()
    assert number_of(manager, label="stable") == 2
    with pytest.raises(RequestError, match="Unrecognized servable version label: canary") as raised:
        number_of(manager, label="canary")
    assert raised.value.code == grpc.StatusCode.INVALID_ARGUMENT  # As in TF Serving's server_core.cc.


def test_a_label_stays_until_its_new_version_is_loaded(manager, publish, tmp_path):
    publish(1)
    write_config(tmp_path, config("latest { num_versions: 1 }", label("stable", 1)))
    manager.poll()
    damage(publish(2))
    write_config(tmp_path, config("specific { versions: 2 }", label("stable", 2)))
    manager.poll()
    assert number_of(manager, label="stable") == 1

    shutil.rmtree(tmp_path / "tiny" / "2")
    publish(2)
    manager.poll()
    assert number_of(manager, label="stable") == 2
    assert manager.versions() == {"tiny": [2]}


def test_a_new_version_replaces_the_old_one_which_ends_after_its_requests(manager, publish):
    publish(1)
    manager.poll()
    with manager.lease(model_spec("tiny")) as old:
        publish(2)
        manager.poll()
        assert number_of(manager) == 2
        assert states(manager) == {1: State.UNLOADING, 2: State.AVAILABLE}
        assert old.run("serving_default", {"examples": examples(3.0)})["ctr"].tolist() == [3.0]
        with pytest.raises(RequestError, match=r"Servable not found for request: Specific\(tiny, 1\)"):
            number_of(manager, version=1)
    assert states(manager) == {1: State.END, 2: State.AVAILABLE}


def test_going_back_to_an_older_version_loads_it_again(manager, publish, tmp_path):
    publish(1), publish(2)
    write_config(tmp_path, config())
    manager.poll()
    write_config(tmp_path, config("specific { versions: 1 }"))
    manager.poll()
    assert manager.versions() == {"tiny": [1]}
    assert states(manager) == {1: State.AVAILABLE, 2: State.END}


def test_a_broken_version_leaves_the_old_one_and_is_tried_again_only_when_it_changes(publish, tmp_path, caplog):
    loads = []

    def load(path, name):
        loads.append(int(path.name))
        return LoadedVersion(path, name)

    manager = VersionManager(tmp_path, load)
    publish(1)
    manager.poll()
    broken = publish(2)
    damage(broken)

    manager.poll()
    manager.poll()

    assert loads == [1, 2]
    assert manager.versions() == {"tiny": [1]}
    state = manager.states(model_spec("tiny"))[2]
    assert state.state == State.END
    assert state.error
    assert str(tmp_path) not in state.error
    assert "version 2 of model 'tiny' cannot be loaded" in caplog.text

    shutil.rmtree(broken)
    publish(2)
    manager.poll()
    assert manager.versions() == {"tiny": [2]}


def test_a_broken_model_does_not_keep_others_from_loading(manager, publish):
    damage(publish(1, name="a"))
    publish(1, name="b")
    manager.poll()
    assert manager.versions() == {"b": [1]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_config_list { nonsense", "text proto"),
        (config().replace("tensorflow", "caffe"), "model_platform"),
        (config(name=""), "name"),
        (config(base_path="/models/.."), "base_path"),
        (config().replace("model_config_list {", f"model_config_list {{ {ENTRY}"), "once"),
        ("", "empty"),
        ("# nothing yet\n", "empty"),
        ("custom_model_config {}", "custom_model_config. Allowed: model_config_list"),
    ],
)
def test_a_broken_config_changes_nothing_and_is_told_once(manager, publish, tmp_path, caplog, text, message):
    publish(1)
    write_config(tmp_path, config(labels=label("stable", 1)))
    manager.poll()
    publish(2)
    (tmp_path / "models.config").write_text(text)

    manager.poll()
    manager.poll()

    assert manager.versions() == {"tiny": [1]}
    assert number_of(manager, label="stable") == 1
    told = [record.getMessage() for record in caplog.records if "stay as they were" in record.getMessage()]
    assert len(told) == 1
    assert message in told[0]


@pytest.mark.parametrize("name", ["²", "9" * 19, "9" * 30, "٣", "7x"])
def test_names_that_tf_serving_reads_no_version_from_are_none_anywhere(tmp_path, name):
    for version in ("1", name):
        (tmp_path / "tiny" / version).mkdir(parents=True)
        (tmp_path / "tiny" / version / "saved_model.pb").touch()
    assert list(ModelVersions(tmp_path, "tiny").published()) == [1]
    assert version_directory(tmp_path / "tiny").name == "1"
    (model,) = read_aspired_versions(tmp_path)
    assert list(model.versions()) == [1]
    assert list(Base(tmp_path / "tiny").versions) == ["1"]


def test_an_empty_config_at_first_serves_nothing(manager, publish, tmp_path):
    publish(1)
    (tmp_path / "models.config").write_text("")
    manager.poll()
    assert manager.versions() == {}


def test_a_broken_version_with_a_dangling_link_is_tried_again_when_it_changes(manager, publish):
    path = publish(1, name="a")
    publish(1, name="b")
    (path / "link").symlink_to("nowhere")
    graph = (path / "saved_model.pb").read_bytes()
    damage(path)
    manager.poll()
    assert manager.versions() == {"b": [1]}
    (path / "saved_model.pb").write_bytes(graph)
    manager.poll()
    assert manager.versions() == {"a": [1], "b": [1]}


def test_a_version_that_goes_away_while_it_is_read_does_not_keep_others_from_loading(publish, tmp_path, monkeypatch):
    publish(1, name="a"), publish(1, name="b")
    gone = tmp_path / "a" / "1" / "variables"
    lstat = pathlib.Path.lstat

    def lstat_or_gone(path):
        if path.is_relative_to(gone):
            raise FileNotFoundError(path)
        return lstat(path)

    monkeypatch.setattr(pathlib.Path, "lstat", lstat_or_gone)
    manager = VersionManager(tmp_path, lambda path, name: LoadedVersion(path, name))
    manager.poll()
    assert manager.versions()["b"] == [1]


def test_a_model_that_leaves_the_config_is_no_longer_served(manager, publish, tmp_path):
    publish(1), publish(1, name="other")
    manager.poll()
    write_config(tmp_path, config())
    manager.poll()
    assert manager.versions() == {"tiny": [1]}
    with pytest.raises(RequestError, match=r"Latest\(other\)"), manager.lease(model_spec("other")):
        pass
    assert states(manager, "other") == {1: State.END}


def write_warmup(path, *records):
    (path / WARMUP_FILE).parent.mkdir()
    with tf.io.TFRecordWriter(str(path / WARMUP_FILE)) as writer:
        for record in records:
            writer.write(record if isinstance(record, bytes) else record.SerializeToString())


def warmup_logs(*xs):
    """A log of every kind that TF Serving replays."""
    parsed = [tf.train.Example.FromString(example(x)) for x in xs]
    request_input = input_pb2.Input(example_list=input_pb2.ExampleList(examples=parsed))
    logs = [prediction_log_pb2.PredictionLog() for _ in range(4)]
    logs[0].predict_log.request.CopyFrom(predict_request(model_spec("tiny"), examples=examples(*xs)))
    logs[1].classify_log.request.model_spec.CopyFrom(model_spec("tiny", "classify"))
    logs[1].classify_log.request.input.CopyFrom(request_input)
    logs[2].regress_log.request.model_spec.CopyFrom(model_spec("tiny", "regress"))
    logs[2].regress_log.request.input.CopyFrom(request_input)
    logs[3].multi_inference_log.request.tasks.add(
        model_spec=model_spec("tiny", "regress"), method_name="tensorflow/serving/regress"
    )
    logs[3].multi_inference_log.request.input.CopyFrom(request_input)
    return logs


def test_warm_up_requests_of_every_kind_are_replayed(publish):
    path = publish(2)
    assert replay_warmup_requests(LoadedVersion(path, "tiny")) == 0
    write_warmup(path, *warmup_logs(1.0, 2.0))
    assert replay_warmup_requests(LoadedVersion(path, "tiny")) == 4


def broken_warmup_records():
    unknown_input = prediction_log_pb2.PredictionLog()
    unknown_input.predict_log.request.CopyFrom(predict_request(model_spec("tiny"), inputs=examples(1.0)))
    unknown_signature = prediction_log_pb2.PredictionLog()
    unknown_signature.predict_log.request.CopyFrom(
        predict_request(model_spec("tiny", "absent"), examples=examples(1.0))
    )
    unknown_output = prediction_log_pb2.PredictionLog()
    unknown_output.predict_log.request.CopyFrom(predict_request(model_spec("tiny"), examples=examples(1.0)))
    unknown_output.predict_log.request.output_filter.append("absent")
    other_tensors = warmup_logs(1.0)[3]
    other_tensors.multi_inference_log.request.tasks.add(
        model_spec=model_spec("tiny", "classify"), method_name="tensorflow/serving/classify"
    )
    unknown_method = warmup_logs(1.0)[3]
    unknown_method.multi_inference_log.request.tasks[0].method_name = "absent"
    no_tasks = warmup_logs(1.0)[3]
    del no_tasks.multi_inference_log.request.tasks[:]
    streamed = prediction_log_pb2.PredictionLog()
    streamed.predict_streamed_log.SetInParent()
    return {
        "no PredictionLog": b"\xff",
        "empty": b"",
        "unknown input": unknown_input,
        "unknown signature": unknown_signature,
        "unknown output": unknown_output,
        "tasks of other tensors": other_tensors,
        "unknown method": unknown_method,
        "no tasks": no_tasks,
        "streamed": streamed,
        "no examples": warmup_logs()[1],
    }


@pytest.mark.parametrize("name", broken_warmup_records())
def test_one_bad_warm_up_record_fails_the_version(publish, name):
    path = publish(2)
    write_warmup(path, *warmup_logs(1.0)[:1], broken_warmup_records()[name])
    with pytest.raises(ValueError, match="warm-up record 2 cannot be replayed"):
        replay_warmup_requests(LoadedVersion(path, "tiny"))


def test_a_failed_warm_up_does_not_quote_what_was_recorded(publish):
    path = publish(2)
    log = warmup_logs(1.0)[0]
    log.predict_log.request.inputs["examples"].string_val[:] = [b"user-4711 is no example"]
    write_warmup(path, log)
    with pytest.raises(ValueError, match=r"^warm-up record 1 cannot be replayed: InvalidArgumentError$") as caught:
        replay_warmup_requests(LoadedVersion(path, "tiny"))
    assert caught.value.__suppress_context__  # Nor does a traceback.


def test_a_warm_up_request_that_the_model_refuses_keeps_the_old_version_serving(publish, tmp_path):
    publish(1)
    with LocalServer(tmp_path, poll_seconds=0.02) as server, prediction_stub(server.grpc_address) as stub:
        path = publish(2, name=".staged")
        refused_log = warmup_logs(1.0)[0]
        refused_log.predict_log.request.inputs["examples"].string_val[:] = [b"no example"]
        write_warmup(path, refused_log)
        path.rename(tmp_path / "tiny" / "2")
        wait_until(lambda: states(server.manager).get(2) == State.END)
        assert stub.Predict(predict_request(model_spec("tiny"), examples=examples(1.0))).model_spec.version.value == 1


def test_versions_swap_under_load_without_a_failed_request(publish, tmp_path):
    publish(1)
    with LocalServer(tmp_path, poll_seconds=0.02) as server, prediction_stub(server.grpc_address) as stub:
        answers, failures = [], []
        stop = threading.Event()

        def client(x):
            while not stop.is_set():
                try:
                    response = stub.Predict(predict_request(model_spec("tiny"), examples=examples(x)), timeout=30)
                    answers.append((response.model_spec.version.value, outputs(response)["ctr"].tolist(), x))
                except grpc.RpcError as error:
                    failures.append(error)

        clients = [threading.Thread(target=client, args=(float(x),)) for x in range(1, 5)]
        slow = stub.Predict.future(slow_request(1.0, 100_000), timeout=60)  # Runs in the old version all the while.
        with contextlib.ExitStack() as stack:
            stack.callback(stop.set)
            for one in clients:
                one.start()
            for number in (2, 3):
                publish(number)
                wait_until(lambda number=number: bool(answers) and answers[-1][0] == number)
        for one in clients:
            one.join()

        assert outputs(slow.result())["ctr"].tolist() == [1.0]
    assert failures == []
    assert {version for version, _, _ in answers} == {1, 2, 3}
    assert all(ctr == [version * x] for version, ctr, x in answers)
