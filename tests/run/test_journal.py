"""What is said of a run reaches MLflow whole, once and in order, whatever MLflow does meanwhile."""

import json
import sqlite3
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.tracking import MlflowClient

from rlhf_vs_dpo.run import journal, store
from rlhf_vs_dpo.run.journal import Journal, Sender, Unanswered

BEGIN = {"create": "rl@x-0", "experiment": store.STAGES, "tags": {"policy": "x-0"}, "params": {"beta": 0.1}}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    quick = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: time.sleep(min(seconds, 0.05))})
    monkeypatch.setattr(journal, "time", quick)  # of this module alone: tests wait as long as they say
    return tmp_path


@pytest.fixture
def away(monkeypatch):
    """A store behind a door: shut, it does not answer; `lost` calls are carried out and their answers lost."""

    class Door:
        shut, lost, calls = False, 0, 0

        def __call__(self):
            return Client(store_client())

    class Client:
        def __init__(self, real):
            self.real = real

        def __getattr__(self, name):
            real = getattr(self.real, name)

            def call(*args, **kwargs):
                door.calls += 1
                if door.shut:
                    raise MlflowException("API request failed: connection refused")
                found = real(*args, **kwargs)
                if door.lost:
                    door.lost -= 1
                    raise MlflowException("API request failed: connection reset")
                return found

            return call

    store_client, door = store.client, Door()
    monkeypatch.setattr(store, "client", door)
    monkeypatch.setattr(journal, "out_of_reach", lambda error: "API request failed" in str(error))
    return door


def steps(count: int) -> list[dict]:
    return [{"metrics": {"loss": 1.0 / (step + 1)}, "step": step} for step in range(count)]


def say(sender: Sender, *messages: dict) -> None:
    for message in messages:
        sender.send(sender.journal.add(message))


def stored(folder, name="x-0"):
    """The runs of that name in the store, and the history of their loss."""
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    place = client.get_experiment_by_name(store.STAGES).experiment_id
    runs = [run for run in client.search_runs([place]) if run.info.run_name == name]
    return runs, [[(p.step, p.value) for p in client.get_metric_history(run.info.run_id, "loss")] for run in runs]


def whole(count: int) -> list[list[tuple[int, float]]]:
    return [[(step, pytest.approx(1.0 / (step + 1))) for step in range(count)]]


def test_answers_that_are_lost_cost_nothing_and_nothing_is_there_twice(here, away):
    said = []
    sender = Sender(Journal(), said.append)
    store.experiment(store.STAGES)
    for message in [
        BEGIN,
        *steps(5),
        {"tags": {"a": "b"}},
        {"inputs": {"data/x.parquet": "0" * 32}},
        {"end": "FINISHED"},
    ]:
        away.lost = 2  # of each kind of call: the first two answers
        sender.flushed = 0.0  # each line is sent by itself
        say(sender, message)
    (run,), history = stored(here)
    assert history == whole(5) and run.info.status == "FINISHED" and run.data.params == {"beta": "0.1"}
    assert run.data.tags["a"] == "b" and len(run.inputs.dataset_inputs) == 1
    assert not list(journal.folder().glob("*.jsonl")) and not list(journal.folder().glob("*.sent"))
    assert (
        said[0].startswith("MLflow does not answer")
        and said[1] == "MLflow answers again"
        and not journal.silence().exists()
    )


def test_training_goes_on_while_mlflow_is_away_and_everything_is_sent_in_order(here, away):
    kept = Journal()
    sender = Sender(kept, lambda text: None)
    store.experiment(store.STAGES)
    lines = [kept.add(message) for message in [BEGIN, *steps(200), {"end": "FINISHED"}]]  # all said; nothing sent
    away.shut = True
    threading.Timer(0.5, lambda: setattr(away, "shut", False)).start()
    for line in lines:
        sender.send(line)
    (run,), history = stored(here)
    assert history == whole(200) and run.info.status == "FINISHED"
    assert (
        run.info.end_time == lines[-1]["at"] and run.info.start_time == lines[0]["at"]
    )  # when it was said, not when it was sent


def test_a_stage_that_has_ended_waits_no_longer_than_it_must_and_its_run_is_sent_later(here, away):
    sender = Sender(Journal(), lambda text: None, patience=0.3)
    store.experiment(store.STAGES)
    away.shut = sender.ended = True
    for message in [BEGIN, *steps(3), {"end": "FINISHED"}]:
        line = sender.journal.add(message)
        with pytest.raises(Unanswered):
            sender.send(line)
    sender.journal.close()
    known = store.JOURNAL + sender.journal.key
    with pytest.raises(Unanswered):  # and whoever comes next asks once
        journal.send_left(print)
    away.shut = False
    with pytest.raises(MlflowException, match="has not been sent"):
        store.known_as(known)
    assert journal.send_left(print) == 1 and journal.send_left(print) == 0
    (run,), history = stored(here)
    assert history == whole(3) and store.known_as(known) == run.info.run_id == store.known_as(run.info.run_id)


@pytest.mark.parametrize("late", [False, True])
def test_a_run_finds_the_one_it_belongs_to_though_that_had_no_id_when_it_began(here, late):
    """A trial of the study begins while MLflow is away: its search is named by its journal, and may be sent after it."""
    search, tried = Sender(Journal(), print), Sender(Journal(), print)
    begin = BEGIN | {"create": "tune@ppo", "tags": {"study": "ppo"}}
    trial = BEGIN | {"tags": {"policy": "ppo 1", "mlflow.parentRunId": store.JOURNAL + search.journal.key}}
    store.experiment(store.STAGES)
    sending = threading.Timer(0.5 if late else 0.0, lambda: say(search, begin))
    sending.start()
    if not late:
        sending.join()
    say(tried, trial, {"end": "FINISHED"})
    sending.join()
    (run,), _ = stored(here, "ppo 1")
    assert run.data.tags["mlflow.parentRunId"] == search.run_id


def test_a_run_that_mlflow_has_not_answered_for_is_known_by_its_journal(monkeypatch):
    from rlhf_vs_dpo.run import frame, recorder

    class Silent(recorder.Recorder):
        def __init__(self):
            self.run_id, self.answered = None, threading.Event()

    monkeypatch.setattr(recorder, "ANSWER_SECONDS", 0.01)
    kept = SimpleNamespace(runs=["first", "second"])
    assert frame.Run({}, Silent(), kept).run_id() == store.JOURNAL + "first"


@pytest.mark.parametrize("sent", [0, 1, 3, 6])
def test_what_a_killed_process_left_is_found_and_its_run_failed(here, sent):
    kept = Journal()
    sender = Sender(kept, lambda text: None)
    lines = [kept.add(message) for message in [BEGIN, *steps(5)]]
    for line in lines[:sent]:
        sender.flushed = 0.0
        sender.send(line)
    kept.close()  # as the end of its process does
    with kept.path.open("a") as file:
        file.write('{"metrics": {"loss": 9')
    assert journal.send_left(print) == 1
    (run,), history = stored(here)
    assert history == whole(5) and run.info.status == "FAILED"


def test_a_journal_has_one_that_attends_to_it(here):
    kept = Journal()
    kept.add(BEGIN)
    assert list(journal.left()) == []
    kept.close()
    (found,) = journal.left()
    assert found.key == kept.key and found.lines() == kept.lines()


def test_a_run_that_mlflow_refuses_is_set_aside_and_named(here, away):
    for params in ({"a": 1}, {"b": "2"}):
        kept = Journal()
        kept.add(BEGIN | {"params": params, "experiment": None if "a" in params else store.STAGES})
        kept.close()
    said = []
    assert journal.send_left(said.append) == 1  # the other one
    (refused,) = journal.folder().glob("*.refused")
    assert str(refused) in said[0]
    assert len(stored(here)[0]) == 1


def test_a_stage_that_says_too_much_waits_until_some_of_it_is_sent(here, monkeypatch):
    monkeypatch.setattr(journal, "LIMIT", 300)
    kept, went_on = Journal(), threading.Event()

    def talk() -> None:
        for message in [BEGIN, *steps(20)]:
            kept.add(message)
        went_on.set()

    threading.Thread(target=talk, daemon=True).start()
    assert not went_on.wait(0.3)
    first = len(kept.lines())
    assert first < 10
    while not went_on.wait(0.02):
        kept.taken(len(kept.lines()))
    assert len(kept.lines()) == 21


def test_what_is_still_to_be_sent_counts_until_it_is_taken(here):
    kept = Journal("x")
    for message in steps(4):
        kept.add(message)
    whole = kept.path.stat().st_size
    assert kept.unsent_bytes == whole
    kept.taken(1)
    assert 0 < whole - kept.unsent_bytes < whole / 2
    kept.taken(4)
    assert kept.unsent_bytes == 0
    kept.add(steps(5)[4])
    assert kept.unsent_bytes == kept.path.stat().st_size - whole
    kept.close()
    after = Journal("x")  # an attempt that goes on: what others have left waits for nobody
    after.add(steps(1)[0])
    after.taken(5)
    assert after.unsent_bytes > 0
    after.taken(6)
    assert after.unsent_bytes == 0


def test_an_artifact_is_the_file_as_it_was(here):
    (here / "note.txt").write_text("before")
    sender = Sender(Journal(), print)
    lines = [sender.journal.add(message) for message in (BEGIN, {"artifact": "note.txt"}, {"end": "FINISHED"})]
    (here / "note.txt").write_text("after")
    for line in lines:
        sender.send(line)
    client = MlflowClient(tracking_uri=f"sqlite:///{here}/mlflow.db")
    assert Path(client.download_artifacts(sender.run_id, "note.txt")).read_text() == "before"
    assert not sender.journal.files.exists()


@pytest.mark.parametrize("seconds", [1.5, pytest.param(25, marks=pytest.mark.slow)])
def test_a_database_that_somebody_else_has_locked_is_waited_for(here, seconds):
    """MLflow itself waits for 20 seconds; what is longer is an outage."""
    said = []
    sender = Sender(Journal(), said.append)
    say(sender, BEGIN)
    holder = sqlite3.connect(here / "mlflow.db", check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    threading.Timer(seconds, holder.rollback).start()
    say(sender, *steps(10), {"end": "FINISHED"})
    (run,), history = stored(here)
    assert history == whole(10) and run.info.status == "FINISHED"
    if seconds > 20:
        assert "locked" in said[0] and said[-1] == "MLflow answers again"


def test_what_is_no_outage_is_no_reason_to_wait(here, monkeypatch):
    refused = MlflowException("no", error_code=INVALID_PARAMETER_VALUE)
    assert not journal.out_of_reach(refused) and not journal.out_of_reach(ValueError("x"))
    assert not journal.out_of_reach(MlflowException("disk I/O error"))  # of an SQLite file
    assert journal.out_of_reach(MlflowException("(sqlite3.OperationalError) database is locked"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert journal.out_of_reach(MlflowException("(psycopg2.OperationalError) server closed the connection"))
    assert not journal.out_of_reach(refused)
    with pytest.raises(Exception) as error:
        store.experiment(store.STAGES)
    assert journal.out_of_reach(error.value)


def test_lines_are_json_and_numbers_survive(here):
    kept = Journal()
    kept.add({"metrics": {"a": 0.1 + 0.2, "b": float("inf")}, "step": 2**40})
    assert (
        kept.lines()[0]["metrics"] == {"a": 0.1 + 0.2, "b": float("inf")}
        and json.loads(kept.path.read_text())["step"] == 2**40
    )


def test_a_run_that_goes_on_has_each_step_once_whatever_was_left_unsent(here):
    """Two attempts: of the first, some steps were sent, some were left in its journal; the second says the last of them again."""
    store.experiment(store.STAGES)
    first = Journal("a")
    sender = Sender(first, print)
    say(sender, BEGIN | {"journals": ["a"]}, *steps(4), {"metrics": {"system/cpu": 1.0}, "step": 0})
    sender.flush()
    for message in [*steps(8)[4:], {"metrics": {"system/cpu": 2.0}, "step": 1}]:
        first.add(message)  # said, and never sent: it was killed, and the process that tells MLflow with it
    first.close()
    again = Sender(Journal("b"), print)
    say(again, BEGIN | {"journals": ["a", "b"]}, *steps(12)[6:])
    say(
        again,
        {"metrics": {"system/cpu": 3.0}, "step": 0},
        {"metrics": {"system/cpu": 4.0}, "step": 1},
        {"end": "FINISHED"},
    )
    (run,), history = stored(here)
    assert history == whole(12) and run.info.status == "FINISHED" and run.data.tags["attempts"] == "2"
    machine = MlflowClient(tracking_uri=f"sqlite:///{here}/mlflow.db").get_metric_history(run.info.run_id, "system/cpu")
    assert [(point.step, point.value) for point in machine] == [(0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0)]
    assert not list(journal.folder().glob("*.jsonl"))


def test_an_attempt_waits_for_the_one_before_that_is_still_making_the_run(here):
    """It was killed as soon as it had begun, and the process that tells MLflow is slow: one run all the same."""
    store.experiment(store.STAGES)
    first = Journal("a")
    sender = Sender(first, print)
    made = threading.Event()

    def slow() -> None:
        made.wait(20)
        say(sender, BEGIN | {"journals": ["a"]}, *steps(4))
        sender.flush()
        first.close()

    def again() -> None:
        say(Sender(Journal("b"), print), BEGIN | {"journals": ["a", "b"]}, *steps(12)[2:], {"end": "FINISHED"})

    threads = [threading.Thread(target=of) for of in (slow, again)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    made.set()
    for thread in threads:
        thread.join()
    (run,), history = stored(here)
    assert history == whole(12) and run.info.status == "FINISHED" and run.data.tags["attempts"] == "2"


def test_attempts_that_wait_for_one_another_all_come_to_an_end(here):
    """Three attempts, two of them killed as soon as they had begun: the last is the first that looks."""
    store.experiment(store.STAGES)
    senders = {key: Sender(Journal(key), print) for key in "abc"}

    def attempt(key: str, *messages: dict) -> threading.Thread:
        journals = [of for of in "abc" if of <= key]

        def tell() -> None:
            say(senders[key], BEGIN | {"journals": journals}, *messages)
            if not any("end" in message for message in messages):  # killed
                senders[key].flush()
                senders[key].journal.close()

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        return thread

    threads = [attempt("c", *steps(12)[4:], {"end": "FINISHED"})]
    time.sleep(0.5)
    threads += [attempt("a", *steps(4)), attempt("b", *steps(6)[3:])]
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    (run,), history = stored(here)
    assert history == whole(12) and run.info.status == "FINISHED" and run.data.tags["attempts"] == "3"


def test_a_count_that_was_cut_off_is_counted_as_nothing_sent(here):
    """A process that was killed while it wrote: lines that are sent again do no harm, a journal that cannot be opened would."""
    kept = Journal("cut")
    kept.add(BEGIN)
    kept.close()
    kept.path.with_suffix(".sent").write_text("")
    again = Journal("cut")
    assert again.sent == 0 and len(again.lines()) == 1
    again.taken(1)
    assert again.path.with_suffix(".sent").read_text() == "1"


def test_threads_may_notice_a_silence_at_once(here):
    for _ in range(20):
        journal.silence().unlink(missing_ok=True)
        together, found, lost = threading.Barrier(8), [], []

        def notice(together=together, found=found, lost=lost):
            together.wait()
            try:
                found.append(journal.silent_since())
            except Exception as error:
                lost.append(error)

        threads = [threading.Thread(target=notice) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not lost and max(found) - min(found) < 5 and journal.silence().exists()


def test_what_is_measured_can_be_put_onto_runs_later_where_mlflow_is_away(here, monkeypatch):
    from rlhf_vs_dpo.run import publish

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(journal, "SILENT_SECONDS", 0.1)
    said = []
    publish.publish([], ["gold"], said.append)
    assert "MLflow does not answer" in said[0] and "dvc repro --force --single-item evaluate" in said[-1]


def test_a_run_that_is_gone_is_no_silence(here, monkeypatch):
    """A server says of every such thing what status it has: only that it does not answer is worth waiting for."""
    monkeypatch.setattr(store, "database", lambda: None)
    with pytest.raises(MlflowException) as error:
        store.known_as(store.JOURNAL + "nobody")
    assert not journal.out_of_reach(error.value)
    assert journal.out_of_reach(MlflowException("a gateway says so"))  # 500, as a server's own troubles are
