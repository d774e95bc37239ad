"""A study in miniature, as a command: ended in a training, and resumed."""

import csv
import json
import pathlib
import signal
import subprocess
import sys

from official_selftrain import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDIES = """
STUDIES = {"alphas": {
    "experiment": "mini",
    "overrides": ["pseudo.score_threshold=0.0"],
    "seeds": [3],
    "variants": {"one": {"self_training.alpha": 1.0}},
}}
"""


def test_a_study_that_is_ended_resumes(data, tmp_path):
    recipe = data / "studies.py"
    recipe.write_text((data / "recipe.py").read_text() + STUDIES)
    command = [
        sys.executable, "-m", "official_selftrain.study", f"--study={recipe}:alphas",
        f"--data_dir={data}", f"--model_dir={tmp_path}/out", "--jobs=2",
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as ended:
        for line in ended.stderr:
            if "student-" in line and "started" in line:
                ended.send_signal(signal.SIGTERM)
    assert ended.returncode == 128 + signal.SIGTERM
    finished = sorted((tmp_path / "out/stages").glob("teacher-*/model.weights.h5"))
    before = [file.stat().st_mtime_ns for file in finished]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [file.stat().st_mtime_ns for file in finished] == before and len(before) == 1
    assert done.stdout.startswith("one: the student is ") and "with one seed" in done.stdout

    results = tmp_path / "out/studies/alphas"
    with open(results / "results.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == ["teacher", "labels", "student"]
    assert {row["state"] for row in rows} == {"done"}
    for row in rows:
        assert (row["steps"] == "4") == bool(row["AP"]) == (row["stage"] != "labels")
    assert "labels/boxes_per_image" in rows[1]
    assert set(json.loads((results / "results.json").read_text())["summary"]) == {"one"}
    assert "<svg" in (results / "study.html").read_text(encoding="utf-8")
    student = config_lib.load(tmp_path / "out/stages" / rows[2]["folder"] / "config.yaml")
    assert student.trainer.seed == 3 and student.trainer.init.endswith(rows[0]["folder"])
    assert student.pseudo.records.endswith(rows[1]["folder"])
