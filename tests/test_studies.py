"""Studies without training: equal stages, the schedule, intervals, tables and mistakes."""

import csv
import io
import json
import math
import sys
import time

import pytest

from official_selftrain import config as config_lib
from official_selftrain.config.studies import StudyConfig, variant_configs
from official_selftrain.pipeline import folder as run_folder
from official_selftrain.pipeline import labeling
from official_selftrain.studies import Study, graph, page, results, schedule
from official_selftrain.studies.intervals import Spread, paired, t_quantile, t_within
from official_selftrain.utils.errors import UserError
from official_selftrain.utils.files import write_json


def study(**changes):
    settings = {"study": "s", "experiment": "demo", "variants": {"plain": {}}, **changes}
    return config_lib.model_from_dict(StudyConfig, settings, "study 's'")


def plan(tmp_path, **changes):
    """`{(variant, seed): {role: name}}`."""
    configs = variant_configs(study(**changes))
    found = {cell: graph.stages_of(config, tmp_path) for cell, config in configs.items()}
    return {cell: {role: s.name for role, s in stages.items()} for cell, stages in found.items()}


# --- What is equal ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "shared"),
    [
        ("self_training.alpha", 3.0, ("teacher", "labels", "control")),
        ("self_training.normalize", False, ("teacher", "labels", "control")),
        ("pseudo.policy", "S4", ("teacher", "labels", "control")),
        ("pseudo.batch_size", 8, ("teacher", "labels")),
        ("pseudo.score_threshold", 0.3, ("teacher", "control")),
        ("unlabeled.on_bad_record", "skip", ("teacher", "control")),
        ("self_training.control", False, ("teacher", "labels", "student")),
        ("self_training.rounds", 2, ("teacher", "labels", "student", "control")),
        ("self_training.student_init", "random", ("teacher", "labels")),
        ("self_training.teacher", {"trainer.steps": 900}, ()),
        ("human.cache", False, ()),
        ("optimizer.l2", 0.0, ()),
        ("trainer.steps", 500, ("teacher", "labels")),  # the teacher has steps of its own
        ("description", "another", ("teacher", "labels", "student", "control")),
        ("runtime.input_threads", 3, ("teacher", "labels", "student", "control")),
        ("data_dir", "/elsewhere", ("teacher", "labels", "student", "control")),
    ],
)
def test_a_stage_is_shared_where_it_does_not_read_what_differs(tmp_path, key, value, shared):
    variants = {"a": {}, "b": {key: value}}
    stages = plan(tmp_path, variants=variants, seeds=[0])
    one, other = stages["a", 0], stages["b", 0]
    assert {role for role in one if one[role] == other.get(role)} == set(shared)


def test_seeds_and_segmentation_share_nothing(tmp_path):
    variants = {"a": {}, "b": {"experiment": "demo_segmentation"}}
    names = [set(s.values()) for s in plan(tmp_path, variants=variants, seeds=[0, 1]).values()]
    assert len(names) == 4 and len(set.union(*names)) == 16


def test_automatic_batches_stay_automatic(tmp_path):
    stages = graph.stages_of(config_lib.resolve("folder"), tmp_path)
    assert {stage.config.human.batch_size for stage in stages.values()} == {"auto"}
    assert stages["labels"].config.pseudo.batch_size == "auto"


def test_a_variant_without_pseudo_labels_is_one_training(tmp_path):
    stages = plan(tmp_path, variants={"a": {}, "b": {"pseudo": None}}, seeds=[0])
    assert stages["b", 0] == {"teacher": stages["a", 0]["teacher"]}


@pytest.mark.parametrize("experiment", ["demo", "demo_segmentation"])
@pytest.mark.parametrize("start", ["teacher", "random"])
def test_stages_are_configured_as_run_does_it(tmp_path, experiment, start):
    """But for the sections that they do not read, and the paths of their parents."""
    config = config_lib.load_experiment(experiment, f"self_training.student_init={start}")
    found = graph.stages_of(config, tmp_path)
    teacher, labels = (str(found[role].folder) for role in ("teacher", "labels"))
    expected = {
        "teacher": config_lib.teacher_config(config),
        "student": config_lib.student_config(config, labels, teacher),
        "control": config_lib.control_config(config, teacher),
    }
    for role, other in expected.items():
        left_out = {"experiment", "description", "unlabeled", "self_training"}
        assert found[role].config.model_dump(exclude=left_out) == other.model_dump(exclude=left_out)
    method, before = found["student"].config.self_training, config.self_training
    for name in ("alpha", "normalize", "decay", "separate_batch_norm"):
        assert getattr(method, name) == getattr(before, name)
    read = found["labels"].config
    assert (read.task, read.unlabeled, read.evaluation) == (
        config.task, config.unlabeled, config.evaluation,
    )  # fmt: skip
    assert read.pseudo.thresholds(5) == config.pseudo.thresholds(5)
    # A process reads them from a file.
    for stage in found.values():
        text = config_lib.dump(stage.config)
        assert config_lib.config_from_dict(config_lib.load_yaml(text, "settings")) == stage.config


def test_settings_that_only_bind_a_student_do_not_stop_the_labels(tmp_path):
    changes = ("trainer.micro_batches=2", "self_training.separate_batch_norm=true")
    found = graph.stages_of(config_lib.load_experiment("demo", *changes), tmp_path)
    assert found["labels"].config.trainer.micro_batches == 1
    assert found["student"].config.trainer.micro_batches == 2


def test_a_stage_of_an_older_default_or_of_other_data_is_refused(tmp_path):
    config = config_lib.load_experiment("demo", data_dir=tmp_path / "a")
    stage = graph.stages_of(config, tmp_path)["teacher"]
    stage.folder.mkdir()
    text = config_lib.dump(stage.config)
    (stage.folder / graph.SETTINGS).write_text(text)
    moved = config_lib.load_experiment("demo", data_dir=tmp_path / "b")
    moved = graph.stages_of(moved, tmp_path)["teacher"]
    stage.check_unchanged()
    moved.check_unchanged()  # what was in a is nowhere else
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="made from the data in .*/a, but --data_dir is now .*/b"):
        moved.check_unchanged()
    (stage.folder / graph.SETTINGS).write_text(text.replace("momentum: 0.9\n", "momentum: 0.8\n"))
    with pytest.raises(UserError, match="optimizer.momentum=0.8, which is now 0.9; choose"):
        stage.check_unchanged()


def test_names_of_files_are_those_of_the_pipeline():
    assert results.METRICS == run_folder.METRICS
    assert results.LABEL_STATISTICS == labeling.LABEL_STATISTICS


# --- Mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": {}}, "study 's': unknown key 'variant'; did you mean 'variants'?"),
        ({"variants": {"p": {"self_training.alpa": 1}}}, "variant 'p': unknown key .*'alpha'?"),
        ({"variants": {"p": {"experiment": "dem"}}}, "variant 'p': no experiment .*'demo'?"),
        ({"variants": {"p": {"trainer.steps": -1}}}, "variant 'p': trainer.steps: must be"),
        ({"variants": {"p": {"self_training.teacher": {"trainer.stps": 1}}}}, "'p': self_train"),
        ({"variants": {"p": {"evaluation": None}}}, "variant 'p': nothing to evaluate on"),
        ({"variants": {"p": {"unlabeled": None}}}, "variant 'p': .* section 'unlabeled'"),
        ({"variants": {}}, "study 's': variants: .*at least 1"),
        ({"variants": {"p": 3}}, "study 's': variants.p: must be a section"),
        ({"seeds": []}, "study 's': seeds: .*at least 1"),
        ({"seeds": [1, 2, 1]}, "study 's': seeds: has a number twice"),
        ({"seed_keys": ["trainer.sed"]}, "seed_keys: unknown key .*'seed'"),
        ({"x": "trainer.stps"}, "x: unknown key 'trainer.stps'; did you mean 'steps'?"),
        ({"x": "task.backbone"}, "x: task.backbone must be a number"),
        ({"study": "../up"}, "study: names a folder"),
    ],
)
def test_mistakes_are_found_before_anything_starts(changes, message):
    with pytest.raises(UserError, match=message):
        variant_configs(study(**changes))


def test_studies_of_a_file_may_name_its_experiments(tmp_path):
    file = tmp_path / "mine.py"
    mine = {"human": {"builtin": "digits/train"}, "trainer": {"steps": 3000}}
    mine["evaluation"] = {"builtin": "digits/val"}
    variants = {"a": {}, "b": {"experiment": "demo"}}
    settings = {"experiment": "mine", "seeds": [7], "variants": variants}
    file.write_text(f"EXPERIMENTS = {{'mine': {mine}}}\nSTUDIES = {{'s': {settings}}}")
    configs = variant_configs(config_lib.load_study(f"{file}:s"), ["trainer.keep_checkpoints=2"])
    assert [config.trainer.steps for config in configs.values()] == [3000, 600]
    assert {(c.trainer.seed, c.trainer.keep_checkpoints) for c in configs.values()} == {(7, 2)}
    with pytest.raises(UserError, match="no study is named 't' in .*; known: s"):
        config_lib.load_study(f"{file}:t")
    with pytest.raises(UserError, match=r"names a file, but no study in it.*mine.py:s"):
        config_lib.load_study(str(file))
    file.write_text("EXPERIMENTS = {}")
    with pytest.raises(UserError, match="must define STUDIES"):
        config_lib.load_study(f"{file}:s")
    with pytest.raises(UserError, match="no study is named 'demo_alfa'; did you mean 'demo_alpha'"):
        config_lib.load_study("demo_alfa")


def test_every_study_of_the_package_can_be_planned(tmp_path):
    assert "demo_alpha" in config_lib.load_studies()
    for name in config_lib.load_studies():
        settings = config_lib.load_study(name)
        configs = variant_configs(settings)
        assert len(configs) == len(settings.variants) * len(settings.seeds)
        planned = Study(settings, configs, tmp_path)
        assert len(planned.stages) <= 4 * len(configs)


# --- The schedule ----------------------------------------------------------------------------


class Fake(graph.Stage):
    """A stage that runs a line of Python in place of a command."""

    code = ""

    def command(self):
        return [sys.executable, "-c", self.code]


def fake(folder, kind, number, code="", *parents):
    stage = Fake(kind, folder / f"{kind}-{number}", config_lib.load_experiment("demo"), parents)
    object.__setattr__(stage, "code", f"import os, sys, time, pathlib; {code}")
    return stage


def run(*stages, jobs=1, may_diverge=False):
    made = schedule.Schedule(dict.fromkeys(stages, "a"), jobs, may_diverge)
    return made.run()


def test_a_failure_stops_what_depends_on_it_and_is_tried_again(tmp_path):
    bad = fake(tmp_path, "teacher", 1, "print('error: no disk\\nbye'); sys.exit(2)")
    labels = fake(tmp_path, "labels", 1, "", bad)
    student = fake(tmp_path, "student", 1, "", bad, labels)
    good = fake(tmp_path, "teacher", 2, "print('x')")
    assert run(bad, labels, student, good) == {
        "teacher-1": "failed", "labels-1": "blocked", "student-1": "blocked", "teacher-2": "done",
    }  # fmt: skip
    assert schedule.reason(bad) == "no disk"
    object.__setattr__(bad, "code", "")
    object.__setattr__(good, "code", "import sys; sys.exit(1)")  # has ended, is not run again
    assert set(run(bad, labels, student, good).values()) == {"done"}
    assert (good.folder / "log.txt").read_text() == "--- started\nx\n"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('50%\\rerror: full disk'); sys.exit(2)", "full disk"),
        ("print('12 % error: full disk\\nbye'); sys.exit(2)", "full disk"),
        ("print('bye'); sys.exit(2)", "bye"),
        ("sys.exit(2)", "no message"),
        ("os.kill(os.getpid(), 9)", "ended by SIGKILL; was there too little memory?"),
        ("os.kill(os.getpid(), 15)", "ended by SIGTERM"),
    ],
)
def test_the_reason_of_a_failure_is_that_of_the_last_process(tmp_path, code, expected):
    stage = fake(tmp_path, "teacher", 1, "print('error: an earlier one'); sys.exit(2)")
    run(stage)
    object.__setattr__(stage, "code", f"import os, sys; {code}")
    assert run(stage) == {"teacher-1": "failed"}
    assert schedule.reason(stage) == expected


def test_a_divergence_is_a_result_only_where_that_is_said(tmp_path):
    write = f"pathlib.Path('{tmp_path}/student-1/diverged.json').write_text('1'); sys.exit(2)"
    student = fake(tmp_path, "student", 1, write)
    later = fake(tmp_path, "labels", 2, "", student)
    assert list(run(student, later).values()) == ["failed", "blocked"]
    assert list(run(student, later, may_diverge=True).values()) == ["diverged", "blocked"]
    object.__setattr__(student, "code", "")
    assert list(run(student, later, may_diverge=True).values()) == ["diverged", "blocked"]
    assert list(run(student, later).values()) == ["done", "done"]


def test_ended_stages_keep_no_data_and_unended_ones_do(tmp_path):
    good, bad = fake(tmp_path, "teacher", 1), fake(tmp_path, "teacher", 2, "sys.exit(1)")
    for stage in (good, bad):
        for name in schedule.SCRATCH:
            (stage.folder / name).mkdir(parents=True)
    run(good, bad)
    assert not (good.folder / "data").exists() and (bad.folder / "checkpoints").exists()


def test_jobs_run_at_the_same_time_with_their_share_of_the_cores(tmp_path, monkeypatch):
    """Each of two stages waits for the other."""
    monkeypatch.setattr(schedule.os, "cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("TF_NUM_INTRAOP_THREADS", raising=False)
    meet = (
        "p = pathlib.Path('{0}'); (p / '{1}').touch(); "
        "[time.sleep(0.01) for _ in iter(lambda: (p / '{2}').exists(), True)]; "
        "print(os.environ['TF_NUM_INTRAOP_THREADS'], os.environ['OMP_NUM_THREADS'])"
    )
    first = fake(tmp_path, "teacher", 1, meet.format(tmp_path, "a", "b"))
    second = fake(tmp_path, "teacher", 2, meet.format(tmp_path, "b", "a"))
    assert set(run(first, second, jobs=2).values()) == {"done"}
    assert (first.folder / "log.txt").read_text() == "--- started\n4 3\n"


def test_an_interruption_ends_the_stages_which_save_first(tmp_path, monkeypatch):
    save = (
        f"import signal; p = pathlib.Path('{tmp_path}'); "
        "signal.signal(15, lambda *_: ((p / 'saved').touch(), sys.exit(143))); "
        "(p / 'ready').touch(); time.sleep(60)"
    )
    stage = fake(tmp_path, "teacher", 1, save)

    def sleep(seconds, original=time.sleep):
        original(seconds)
        if (tmp_path / "ready").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(schedule.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        run(stage)
    assert (tmp_path / "saved").exists()
    state, seconds = schedule.state_of(stage)
    assert state == "waiting" and 0 < seconds < 30
    monkeypatch.undo()
    object.__setattr__(stage, "code", "")
    assert run(stage) == {"teacher-1": "done"}
    assert schedule.state_of(stage)[1] >= seconds


def test_a_stage_waits_for_the_process_that_an_earlier_study_has_left(tmp_path):
    stage = fake(tmp_path, "teacher", 1, "time.sleep(60)")
    killed = schedule.Schedule({stage: "a"}, 1, False)
    killed._start_ready()
    object.__setattr__(stage, "code", "")
    made = schedule.Schedule({stage: "a"}, 1, False)
    made._start_ready()
    assert killed.running and not made.running
    process, _ = killed.running["teacher-1"]
    process.kill()
    process.wait()
    assert made.run() == {"teacher-1": "done"}


def test_time_left_is_known_once_each_kind_has_ended(tmp_path):
    for number, seconds in ((1, 10.0), (2, 20.0)):
        stage = fake(tmp_path, "teacher", number)
        stage.folder.mkdir()
        write_json(stage.folder / schedule.STATE, {"state": "done", "seconds": seconds})
    known = schedule.durations(tmp_path)
    assert known == {"teacher": 15.0}
    more = [fake(tmp_path, "teacher", n) for n in (3, 4)]
    assert schedule.time_left(more, known, 2) == (15.0, set())
    labels = fake(tmp_path, "labels", 3)
    assert schedule.time_left([*more, labels], known, 2) == (None, {"labels"})


# --- Intervals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (99, 1.9842)],
)
def test_quantiles_of_t_are_those_of_the_tables(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, abs=5e-5)


def test_t_is_cauchy_with_one_degree_of_freedom_and_normal_with_many():
    assert t_within(1.0, 1) == pytest.approx(0.5)
    assert t_within(1.0, 10_000) == pytest.approx(math.erf(2**-0.5), abs=1e-4)
    assert t_quantile(4, 0.99) == pytest.approx(4.6041, abs=5e-5)


def test_the_interval_of_paired_differences():
    spread = paired([41.0, 43.0, None, 45.0], [40.0, 41.0, 9.0, 42.0])
    assert spread.values == (1.0, 2.0, 3.0) and spread.deviation == 1.0
    low, high = spread.interval  # 2 -+ 4.3027 / sqrt(3)
    assert (low, high) == (pytest.approx(-0.4841, abs=1e-4), pytest.approx(4.4841, abs=1e-4))
    assert spread.sign == 0 and Spread((2.0, 2.1, 2.2)).sign == 1
    assert Spread((-2.0, -2.1, -2.2)).sign == -1
    assert Spread((3.0,)).interval is None and Spread((3.0,)).sign == 0
    assert math.isnan(Spread(()).mean)


# --- Results ---------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path):
    """A study whose stages have written what real ones do."""
    settings = study(
        seeds=[0, 1, 2],
        variants={
            "low <a>": {"self_training.alpha": 0.5},
            "high": {"self_training.alpha": 2.0},
        },
        x="self_training.alpha",
        may_diverge=True,
    )
    configs = variant_configs(settings)
    made = Study(settings, configs, tmp_path)
    for (variant, seed), stages in made.plan.items():
        for role, stage in stages.items():
            stage.folder.mkdir(parents=True, exist_ok=True)
            lost = (variant, seed, role) == ("high", 2, "student")
            state = "diverged" if lost else "done"
            write_json(stage.folder / "stage.json", {"state": state, "seconds": 10.0})
            if role == "labels":
                found = {
                    "images": 9,
                    "precision": 0.75,
                    "boxes_per_class": {"a": 3},
                    "made_of": "x",
                }
                write_json(stage.folder / "statistics.json", found)
                continue
            (stage.folder / "history.jsonl").write_text('{"step": 5}\n{"step": 7}\n')
            ap = {"teacher": 0.4, "control": 0.41, "student": 0.43}[role] + 0.01 * seed
            ap += 0.002 * seed * (role == "student")
            write_json(stage.folder / "metrics.json", {"AP": ap, "AP50": 0.9, "AP/dog": -1.0,
                                                       "AP/cat": ap, "ema/AP": 0.1})  # fmt: skip
    return made


def test_rows_and_summary(measured):
    found = measured.results()
    assert found.metric == "AP" and found.class_metrics == ["AP/dog", "AP/cat"]
    assert len(found.rows) == 2 * 3 * 4
    rows = list(csv.DictReader(io.StringIO(found.as_csv())))
    assert rows[0]["stage"] == "teacher" and float(rows[0]["AP"]) == 0.4
    assert (rows[0]["steps"], rows[0]["seconds"], rows[0]["seed"]) == ("7", "10.0", "0")
    assert rows[1]["stage"] == "labels" and rows[1]["labels/precision"] == "0.75"
    summary = json.loads(json.dumps(found.as_json()))["summary"]
    assert summary["low <a>"]["teacher"] == {
        "n": 3, "mean": pytest.approx(41.0), "sd": pytest.approx(1.0), "low": pytest.approx(38.516,
        abs=1e-3), "high": pytest.approx(43.484, abs=1e-3), "diverged": 0,
    }  # fmt: skip
    difference = summary["low <a>"]["student - control"]
    assert difference["AP"]["mean"] == pytest.approx(2.2)
    assert difference["AP/dog"] == {"n": 0, "mean": None, "sd": None, "low": None, "high": None}
    assert summary["high"]["student"]["diverged"] == 1 and summary["high"]["student"]["n"] == 2


def test_sentences_and_tables(measured):
    found = measured.results()
    assert found.sentences() == [
        "low <a>: the student is above the control: +2.2 AP [1.7, 2.7], 3 seeds.",
        "low <a>: the student is above the teacher: +3.2 AP [2.7, 3.7], 3 seeds.",
        "high: the student is above the control: +2.1 AP [0.8, 3.4], 2 seeds; 1 of 3 students "
        "diverged.",
        "high: the student is above the teacher: +3.1 AP [1.8, 4.4], 2 seeds; 1 of 3 students "
        "diverged.",
    ]
    header, rows = found.main_table()
    assert dict(zip(header, rows[0], strict=True)) == {
        "variant": "low <a>", "seeds": "3", "teacher AP": "41.0 ± 1.0",
        "control AP": "42.0 ± 1.0", "student AP": "44.2 ± 1.2",
        "student - control": "+2.2 [1.7, 2.7]", "student - teacher": "+3.2 [2.7, 3.7]",
        "teacher diverged": "0", "control diverged": "0", "student diverged": "0",
    }  # fmt: skip
    text = found.as_markdown()
    assert "| low <a> | cat | +2.2 [1.7, 2.7] | +3.2 [2.7, 3.7] |" in text
    assert "- high: the student is above the control" in text


def test_one_seed_has_no_interval_and_none_no_number(tmp_path):
    settings = study(seeds=[0])
    made = Study(settings, variant_configs(settings), tmp_path)
    assert made.results().sentences() == [
        f"plain: student and {rival} cannot be compared yet." for rival in ("control", "teacher")
    ]
    assert made.results().main_table()[1] == [["plain", "0", *[""] * 5]]
    for role, ap in (("student", 0.5), ("control", 0.52)):
        folder = made.plan["plain", 0][role].folder
        folder.mkdir(parents=True)
        write_json(folder / "stage.json", {"state": "done", "seconds": 1.0})
        write_json(folder / "metrics.json", {"mIoU": ap, "IoU/a": ap})
    found = made.results()
    assert found.sentences()[0] == (
        "plain: the student is -2.0 mIoU from the control with one seed; an interval needs two or "
        "more."
    )
    assert found.class_metrics == ["IoU/a"]


def test_the_page_is_one_file_with_figures(measured, monkeypatch):
    pytest.importorskip("matplotlib")
    text = page.page(measured.results(), dict(measured.configs))
    assert "low &lt;a&gt;" in text and "<a>" not in text
    assert text.count("<svg") == 3  # student - control, student - teacher, over alpha
    assert "student is above the control" in text and "0.75" in text
    assert 'src="http' not in text and "<link" not in text
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bare = page.page(measured.results(), dict(measured.configs))
    assert "pip install 'official_selftrain[report]'" in bare and "<svg" not in bare


def test_the_forecast_counts_stages_and_hours(measured, tmp_path):
    rows = dict(measured.forecast(2))
    assert rows["trainings"] == str(3 * 2 + 2 * 3) and rows["label sets"] == "3"
    assert rows["shared"].startswith("9 ") and rows["finished"] == "15"
    assert rows["time left"] == "0 s with --jobs=2"
    new = Study(study(), variant_configs(study()), tmp_path / "new")
    assert "unknown before the first of each kind" in dict(new.forecast(1))["time left"]
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else_is_refused(tmp_path):
    settings = study()
    configs = variant_configs(settings)
    (tmp_path / "study.log").touch()
    (tmp_path / ".hidden").touch()
    Study(settings, configs, tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="holds something else than studies, such as config.yaml"):
        Study(settings, configs, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        Study(settings, configs, tmp_path / "config.yaml")


def test_only_one_study_works_in_a_folder(measured):
    with measured._locked(), pytest.raises(UserError, match="another process works in"):
        measured.run(1)


def test_run_needs_what_a_study_needs():
    config = config_lib.load_experiment("demo", "unlabeled=null")
    with pytest.raises(UserError, match="needs the section 'unlabeled'"):
        config_lib.check_stages(config)
