import json
import math
import subprocess
import sys

import pytest

import official_selftrain as ost
from official_selftrain import config as config_lib
from official_selftrain.config import build, lengths
from official_selftrain.utils.errors import UserError


def test_every_experiment_loads_and_survives_yaml(tmp_path):
    for name in config_lib.load_experiments():
        config = config_lib.resolve(name)
        file = tmp_path / f"{name}.yaml"
        file.write_text(config_lib.dump(config))
        assert config_lib.config_from_dict(config_lib.load_file(file)) == config
        config_lib.teacher_config(config)


def test_override_forms_of_the_released_code(golden):
    for case in json.loads((golden / "configs/override_examples.json").read_text()):
        assert config_lib.parse_override(case["params_override"]) == case["parsed"]


def test_precedence(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("trainer: {steps: 7, seed: 3}")
    overrides = ["trainer.seed=4,optimizer.warmup_steps=1"]
    config = config_lib.resolve("demo", str(file), overrides)
    assert (config.trainer.steps, config.trainer.seed) == (7, 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.step=3", "unknown key 'trainer.step'; did you mean 'steps'"),
        ("pseudo.score_treshold=0.3", "did you mean 'score_threshold'"),
        ("trainr.steps=3", "unknown key 'trainr'; did you mean 'trainer'"),
        ("task.anchor_sise=3", "unknown key 'task.anchor_sise'; did you mean 'anchor_size'"),
        ("task.nms.pre_nm=3", "unknown key 'task.nms.pre_nm'; did you mean 'pre_nms'"),
        ("anchor_size=3", "unknown key 'anchor_size'; the full name is task.anchor_size$"),
        ("anchor_sise=3", "unknown key 'anchor_sise'; did you mean 'task.anchor_size'"),
        ("on_bad_record=skip", "full name is human.on_bad_record or unlabeled.on_bad_record or"),
        (
            "trainer.batch_size=3",
            "full name is human.batch_size or pseudo.batch_size or evaluation",
        ),
        ("nms.pre_nms=3", "unknown key 'nms'; the full name is task.nms"),
        ("{trainer.steps: 5}", "in a file, write trainer: {steps: ...}"),
        ("{1: 2}", "1: a key must be text"),
        ("task.xyz=1", "unknown key 'task.xyz'; known: num_classes, image_size, backbone"),
        ("task.backbone_sizes={endpoint_filter: 32}", "did you mean 'endpoint_filters'"),
        ("task.backbone_sizes={width: 1.0}", "of a SpineNet among those of an EfficientNet"),
        ("task.backbone=spinenet49s", "unknown value 'spinenet49s'; did you mean 'spinenet49S'"),
        ("task.backbone=vgg16", "task.backbone: must be 'spinenet49S', 'spinenet49'"),
        ("task.kind=segmantation", "task.kind: must be detection or segmentation .*'segmantation'"),
        (
            "task.kind=segmentation",
            "experiment 'demo': task.anchor_size, .* of task.kind=detection",
        ),
        ("task=5", "task: must be a section, that is, keys with values .given 5"),
        ("human=null", "human: must be a section, that is, keys with values .given None"),
        ("trainer.steps=2.5", "trainer.steps: .*integer"),
        ("trainer.steps=true", "trainer.steps: must be a number .given True"),
        ("trainer.steps=7,trainer.epochs=2.5", "trainer: steps .7. and epochs .2.5. both give"),
        ("trainer.seed=1e20", "trainer.seed: must be at most 4,294,967,295: random generators"),
        ("task.anchor_size=-1", "task.anchor_size: must be greater than 0 .given -1"),
        ("task.bn_epsilon=.nan", "task.bn_epsilon: must be a finite number"),
        ("published=.inf", "published: must be a finite number"),
        ("self_training.alpha=fast", "self_training.alpha: .*given 'fast'"),
        ("self_training.alpha=-1", "greater than or equal to 0"),
        ("self_training.decay=fast", "self_training.decay: must be 'auto' .given 'fast'.$"),
        (
            "self_training.decay=2",
            "self_training.decay: must be less than or equal to 1 .given 2.$",
        ),
        (
            "task.image_size=[100,128]",
            "divisible by 128 = 2.7; given .100, 128., the nearest is .128",
        ),
        ("task.image_size=[96,600]", r"the nearest is \[128, 640\]"),
        ("task.image_size=640", r"must be height and width in pixels, such as \[640, 640\]"),
        ("task.image_size=[a,b]", "task.image_size: must be a valid integer.*'a'.$"),
        ("task.image_size=[128]", "task.image_size: has too few numbers"),
        ("task.image_size=[128,128,3]", "task.image_size: .*at most 2"),
        ("runtime.strategy=pod", "'default', 'mirrored', 'multi_worker_mirrored'"),
        ("human.embedded=train", "unknown key 'human.embedded'; known: .* split, builtin, "),
        ("human.builtin=train", "human.builtin: must be 'digits/train', .* .given 'train'"),
        ("human.images=x", "one of records, images, tfds, builtin, not images and builtin"),
        ("human.images=[a,b]", "human.images: must be one text; write several files as a glob"),
        ("human.images=2017", "human.images: must be a text; put it in quotes"),
        ("human.images={a: b}", "human.images: must be a valid string"),
        ("human.exclude_lists=a.txt", "human.exclude_lists: must be a list, such as .a, b."),
        ("human.masks=masks", "masks needs `images`"),
        ("human.class_list=names.txt", "class_list needs `images` or `records`"),
        (r'data_dir="a\0b"', "data_dir: contains a NUL character"),
        (r'data_dir="\ud800"', "data_dir: is not valid UTF-8"),
        ("optimizer.warmup_steps=5000", "more than trainer.steps"),
        ("human.jitter=[2.0,0.5]", "smallest scale comes first"),
        ("pseudo.class_thresholds={9: 0.5},task.num_classes=7", "class 9, but .* from 1 to 6"),
        (
            "pseudo={score_threshold: auto, class_thresholds: {1: 0.5}}",
            "pseudo: class_thresholds and score_threshold=auto exclude each other",
        ),
        ("pseudo.score_threshold=atuo", "unknown value 'atuo'; did you mean 'auto'"),
        ("pseudo.target_precision=1.2", "pseudo.target_precision: must be less than or equal"),
        ("pseudo.agnostic_nms_iou=-0.5", "pseudo.agnostic_nms_iou: must be greater than or equal"),
        (
            "task.label_scales=[1.0,1.5]",
            r"label_scales=\[1.0, 1.5\]: a SpineNet has one image size",
        ),
        ("task.eval_scales=[0.5]", "eval_scales=.* a SpineNet has one image size"),
        ("pseudo.class_thresholds={0: 0.5}", "class 0, but the classes are numbered from 1"),
        (
            "pseudo.class_thresholds={king: 0.5}",
            "pseudo.class_thresholds.king: must be a valid int",
        ),
        (
            "self_training.teacher={trainer.stps: 3}",
            "self_training.teacher: unknown .* mean 'steps'",
        ),
        ("self_training.teacher={trainer.steps: -3}", "self_training.teacher: trainer.steps: must"),
        ("self_training.teacher=5", "self_training.teacher: must be a section"),
        ("trainer.steps", "key=value"),
        ("a..b=1", "key=value"),
        ("{trainer: {steps: 1, steps: 2}}", "'steps' twice"),
        ("trainer.steps=[1,2", "'trainer.steps=.1,2', line 1, column 5: not valid YAML"),
        ("nothing.yaml", "cannot read the config file nothing.yaml"),
    ],
)
def test_mistakes_are_answered_with_the_key(override, message):
    with pytest.raises(UserError, match=message) as told:
        config_lib.resolve("demo", overrides=[override])
    assert "\n" not in str(told.value)


def test_no_value_at_all_is_null():
    assert config_lib.resolve("demo", overrides=["human.images="]).human.images is None


def test_every_mistake_is_told_once_with_the_file_that_it_is_in(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("task: {anchor_sise: 3}\ntrainer: {sed: 1}\n")
    with pytest.raises(UserError) as told:
        config_lib.resolve("demo", str(file), ["trainer.step=3"])
    assert str(told.value) == (
        f"{file}: unknown key 'task.anchor_sise'; did you mean 'anchor_size'?; "
        "unknown key 'trainer.sed'; did you mean 'seed'?; "
        "--params_override 'trainer.step=3': unknown key 'trainer.step'; did you mean 'steps'?"
    )
    saved = tmp_path / "config.yaml"
    saved.write_text(config_lib.dump(config_lib.resolve("demo")).replace("anchor_size", "anchr"))
    with pytest.raises(UserError, match=f"^{saved}: unknown key 'task.anchr'"):
        config_lib.load(saved)


def test_settings_of_the_other_kind_of_task_are_named_together(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("task: {kind: segmentation}")
    message = (
        "^experiment 'folder': task.anchor_size, task.head_filters: settings of "
        "task.kind=detection, but this task is segmentation; start from an experiment of that kind$"
    )
    with pytest.raises(UserError, match=message):
        config_lib.resolve("folder", str(file))


def test_a_file_without_experiment_says_what_to_add(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("human: {images: a}\ntrainer: {steps: 3000}")
    with pytest.raises(
        UserError, match="give --experiment=NAME.*or.*add a line `experiment: NAME`"
    ):
        config_lib.resolve(config_file=str(file))
    file.write_text("experiment: mine\n" + file.read_text())
    assert config_lib.resolve(config_file=str(file)).experiment == "mine"


def _sections(group):
    """A section and all below it, those of both kinds of tasks among them."""
    yield group
    for field in group.model_fields.values():
        for member in build.members_of(field.annotation).values():
            yield from _sections(member)


def test_every_setting_has_a_description_that_is_a_sentence():
    for section in set(_sections(config_lib.Config)):
        for name, field in section.model_fields.items():
            text = field.description
            assert text and text[0].isupper() and text.endswith("."), (section, name)


def _fields(group, prefix=""):
    """Dotted keys of all settings, those of both kinds of tasks among them."""
    for name, field in group.model_fields.items():
        members = build.members_of(field.annotation)
        if not members:
            yield prefix + name
        for member in members.values():
            yield from _fields(member, f"{prefix}{name}.")


def test_no_open_number_takes_what_no_machine_bears():
    """Infinity, NaN and 10^12 are refused by every number of every section."""
    base = {
        "detection": config_lib.resolve("demo").model_dump(),
        "segmentation": config_lib.resolve("demo_segmentation").model_dump(),
    }
    refused = 0
    for key in set(_fields(config_lib.Config)):
        kind = "segmentation" if key.rpartition(".")[2] in SEGMENTATION else "detection"
        if key.endswith((".width", ".depth")):
            kind = "segmentation"
        for value in (math.inf, -math.inf, math.nan, 1e12, -1e12, 10**30, [math.inf, 1e12]):
            values = config_lib.merge(base[kind], config_lib.nested(key, value))
            if key.startswith("task.backbone_sizes"):
                values["task"]["backbone_sizes"] = {key.rpartition(".")[2]: value}
            if key == "published" and value in (1e12, -1e12, 10**30):
                continue  # a number to print
            with pytest.raises(UserError, match="task|" + key.rpartition(".")[2]):
                config_lib.config_from_dict(values)
            refused += 1
    assert refused > 90 * 7


SEGMENTATION = set(config_lib.SegmentationConfig.model_fields) - set(
    config_lib.DetectionConfig.model_fields
)


@pytest.mark.parametrize(
    ("key", "largest"),
    [
        ("task.num_classes", 10_000),
        ("task.max_instances", 10_000),
        ("human.batch_size", 16_384),
        ("human.shuffle_buffer", 1_000_000),
        ("runtime.input_threads", 1024),
        ("trainer.seed", 2**32 - 1),
        ("trainer.steps", 10**9),
        ("optimizer.learning_rate", 1000.0),
    ],
)
def test_the_largest_value_is_taken_and_the_next_one_refused_with_it(key, largest):
    config_lib.resolve("demo", overrides=[f"{key}={largest}"])
    with pytest.raises(UserError, match=f"{key}: must be at most {largest:,}: [a-z]"):
        config_lib.resolve("demo", overrides=[f"{key}={largest + 1}"])


def test_thresholds_of_absent_classes_are_refused_once_the_classes_are_known():
    config = config_lib.resolve("demo", overrides=["pseudo.class_thresholds={9: 0.5}"])
    with pytest.raises(UserError, match="class 9, but the classes are numbered from 1 to 5"):
        config.override({"task.num_classes": 6})
    assert config.override({"task.num_classes": 10}).task.num_classes == 10


def test_masks_have_at_most_255_classes():
    with pytest.raises(UserError, match="must be at most 255: a mask has 8 bits"):
        config_lib.resolve("demo_segmentation", overrides=["task.num_classes=256"])


def test_settings_given_in_python_are_checked_as_those_of_a_file():
    for task in (ost.DetectionTask, ost.SegmentationTask):
        with pytest.raises(UserError, match="unknown key 'num_clases'; did you mean 'num_classes'"):
            task(num_clases=91)


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: config_lib.DetectionConfig(num_clases=91), "'num_clases'; did you mean 'num_cl"),
        (lambda: config_lib.TrainerConfig(steps=5, sed=1), "'sed'; did you mean 'seed'"),
        (lambda: config_lib.TrainerConfig(steps=0), "^steps: must be greater than .* .given 0.$"),
        (
            lambda: config_lib.Config(
                experiment="mine", human={"imags": "a"}, trainer={"steps": 5000}
            ),
            "^unknown key 'human.imags'; did you mean 'images'",
        ),
        (
            lambda: config_lib.Config(**{"trainer.steps": 5}),
            "in a file, write trainer: {steps: ...}",
        ),
    ],
)
def test_a_config_made_in_python_is_checked_as_a_file_is(build_it, message):
    with pytest.raises(UserError, match=message) as told:
        build_it()
    assert "\n" not in str(told.value)


def test_groups_in_a_config_made_in_python_may_be_dicts_or_objects():
    human, trainer = {"images": "a"}, {"steps": 5000}
    from_dicts = config_lib.Config(experiment="mine", human=human, trainer=trainer)
    from_objects = config_lib.Config(
        experiment="mine",
        human=config_lib.HumanConfig(**human),
        trainer=config_lib.TrainerConfig(**trainer),
    )
    assert from_dicts == from_objects and from_dicts.human.images == "a"


def test_changed_checks_names_and_values():
    nms = config_lib.changed(config_lib.NmsConfig(), soft_sigma=0.3)
    assert (nms.soft_sigma, nms.pre_nms) == (0.3, 5000)
    with pytest.raises(UserError, match="unknown key 'num_clases'; did you mean 'num_classes'"):
        config_lib.changed(config_lib.DetectionConfig(), num_clases=91)
    with pytest.raises(UserError, match="soft_sigma: must be greater than or equal to 0"):
        config_lib.changed(nms, soft_sigma=-1.0)


# --- Files -----------------------------------------------------------------------------------


def load(tmp_path, content, name="c.yaml"):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return config_lib.load_file(file)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
        ("a: {<<: [{b: 1}, {b: 2, c: 3}]}", {"a": {"b": 1, "c": 3}}),
        (b"\xef\xbb\xbfa: 1", {"a": 1}),
        ("a: 1".encode("utf-16"), {"a": 1}),
        ("a: no\nb: on\nc: Y", {"a": "no", "b": "on", "c": "Y"}),
        ("a: true\nb: False", {"a": True, "b": False}),
        ("a: 2024-01-01", {"a": "2024-01-01"}),
        ("a: 16:9\nb: 010\nc: 0x10", {"a": "16:9", "b": "010", "c": 16}),
        ("a: 1e-3\nb: 1E5\nc: -.5\nd: 1.", {"a": 0.001, "b": 1e5, "c": -0.5, "d": 1.0}),
        ("a: \nb: ~\nc: null", {"a": None, "b": None, "c": None}),
    ],
)
def test_plain_values_and_merges_of_yaml(tmp_path, content, values):
    assert load(tmp_path, content) == values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("t:\n  a: 1\n  b: 2\n  a: 3\n", "the key 'a' twice, in line 2 and in line 4"),
        ("t: {<<: {a: 1}, b: 2, b: 3}", "the key 'b' twice"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: " + "{a: " * 200 + "1" + "}" * 200, "nested too deeply, more than 50 levels"),
        (BOMB, "more than 100,000 values"),
        ("a: &x [*x]", "nested too deeply, more than 50 levels, or contains itself"),
        ("a: &x {b: *x}", "or contains itself"),
        (b"\xff\xfa", "not UTF-8"),
        ("a:\n\tb: 1", r"c.yaml, line 2, column 1: not valid YAML: .*'\\t'"),
        ("", "must contain keys and values"),
        ("- a\n", "must contain keys and values"),
        ("a: 1\n---\nb: 2", "line 2, column 1: not valid YAML: .*another document"),
        ("a: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("a: !!int foo", "not valid YAML: invalid literal"),
        ("a: !!timestamp 2024-99-99", "not valid YAML: month must be"),
        ("a: !!python/object/apply:os.system [ls]", "line 1, column 4: .*os.system"),
        ("? [1, 2]\n: 3", "unhashable key"),
        ("a: *x", "undefined alias 'x'"),
        ("a: {<<: 5}", "expected a mapping"),
        (b"a\0b: 1", "special characters are not allowed"),
    ],
)
def test_broken_yaml_takes_one_line_with_the_file(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as told:
        load(tmp_path, content)
    assert "c.yaml" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100 + "1" + "}" * 100, "nested too deeply"),
        ("", "not valid JSON"),
        ("[1]", "must contain keys and values"),
    ],
)
def test_broken_json_takes_one_line_with_the_file(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as told:
        load(tmp_path, content, "c.json")
    assert "c.json" in str(told.value) and "\n" not in str(told.value)


def test_json_may_be_indented_by_tabs(tmp_path):
    assert load(tmp_path, '\ufeff{\n\t"a": {\n\t\t"b": 1e-3}}', "c.json") == {"a": {"b": 0.001}}


def test_a_quote_inside_a_word_of_an_override_is_a_letter():
    parsed = config_lib.parse_override("description=it's,trainer.steps=7,human.images='a,b'")
    assert parsed == {
        "description": "it's",
        "trainer": {"steps": 7},
        "human": {"images": "a,b"},
    }


def test_misspelt_experiment_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'demo'"):
        config_lib.resolve("dmeo")
    with pytest.raises(UserError, match="does not exist"):
        config_lib.resolve("nowhere.py:demo")


def test_experiment_of_ones_own_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "EXPERIMENTS = {'mine': {'human': {'images': 'x'}, 'trainer': {'steps': 5000}}}"
    )
    assert config_lib.resolve(f"{file}:mine").trainer.steps == 5000
    with pytest.raises(UserError, match="'mein' in .*mine.py; did you mean 'mine'"):
        config_lib.resolve(f"{file}:mein")
    with pytest.raises(
        UserError, match="names a file, but no experiment .* one of: .*mine.py:mine"
    ):
        config_lib.resolve(str(file))
    with pytest.raises(UserError, match="mien.py does not exist; did you mean 'mine.py'"):
        config_lib.resolve(f"{tmp_path}/mien.py:mine")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("a = 1\nb = = 2\n", "mine.py, line 2, is not valid Python"),
        ("a = 1\n\nraise KeyError('x')", "mine.py, line 3, cannot be executed: KeyError: 'x'"),
        ("import sys\nsys.exit(0)", "mine.py, line 2, cannot be executed: SystemExit: 0"),
        ("import no_such_module", "line 1, cannot be executed: ModuleNotFoundError: .*no_such"),
        ("def f():\n  return 1 / 0\n\nf()", "mine.py, line 2, cannot be executed: ZeroDivision"),
        (
            "EXPERIMENTS = [1]",
            r"must define EXPERIMENTS, a dict of names and settings; it is \[1\]",
        ),
        ("", "must define EXPERIMENTS, a dict of names and settings; it is missing"),
        ("EXPERIMENTS = {'mine': 5}", "a dict of names and settings; the value of 'mine' is 5"),
        ("EXPERIMENTS = {5: {}}", "a dict of names and settings; the value of 5 is {}"),
        ("EXPERIMENTS = {'mine': {}}\nEXPERIMENTS['mine']['a'] = EXPERIMENTS", "contains itself"),
        ("EXPERIMENTS = {'mine': {'trainer': len}}", "trainer: must be a section"),
        ("x = '\0'", "is not valid Python"),
    ],
)
def test_broken_experiment_files_take_one_line(tmp_path, code, message):
    file = tmp_path / "mine.py"
    file.write_text(code)
    with pytest.raises(UserError, match=message) as told:
        config_lib.resolve(f"{file}:mine")
    assert "mine" in str(told.value) and "\n" not in str(told.value)


def test_tuples_of_an_experiment_file_come_back_from_yaml_as_they_were(tmp_path):
    changes = {"self_training.teacher": {"task.image_size": (256, 256)}}
    config = config_lib.resolve("demo").override(changes)
    assert config_lib.config_from_dict(config_lib.load_yaml(config_lib.dump(config), "c")) == config


def test_stage_configs():
    config = config_lib.resolve("demo")
    teacher = config_lib.teacher_config(config)
    assert teacher.pseudo is None
    assert teacher.trainer.steps == config.self_training.teacher["trainer.steps"]
    student = config_lib.student_config(config, "labels/*.tfrecord", "teacher")
    assert (student.pseudo.records, student.trainer.init) == ("labels/*.tfrecord", "teacher")
    control = config_lib.control_config(config, "teacher")
    assert control.pseudo is None
    assert control.trainer == student.trainer
    assert control.human.batch_size == student.human.batch_size + student.pseudo.batch_size


@pytest.mark.parametrize(
    ("images", "batch", "steps"),
    [(48, 8, 800), (100, 8, 1250), (103, 8, 1300), (1000, 8, 12500), (118_000, 256, 20_000)],
)
def test_a_length_that_is_not_given_follows_from_the_images(images, batch, steps):
    assert config_lib.default_steps(images, batch) == steps


@pytest.mark.parametrize(
    ("steps", "loop", "interval"),
    [(4, 100, 1), (500, 100, 25), (800, 100, 50), (2000, 100, 100), (20_000, 100, 1000), (9, 7, 1)],
)
def test_evaluations_fit_the_loops(steps, loop, interval):
    assert lengths.evaluation_interval(steps, loop) == interval


def test_lengths_in_epochs_and_of_the_data():
    override = "trainer={steps: null, epochs: 2.5},self_training.teacher.trainer.steps=null"
    config = config_lib.resolve("demo", overrides=[override])
    assert config.trainer.steps is None
    done = config_lib.with_length(config, 80, selection=True)
    batch = config.human.batch_size
    assert done.steps == done.trainer.steps == round(2.5 * 80 / batch)
    assert done.optimizer.warmup_steps == done.steps // 10
    assert done.trainer.evaluation_interval == done.trainer.checkpoint_interval
    assert config_lib.with_length(done, 999, selection=True) == done
    given = config_lib.resolve("demo", overrides=["trainer.evaluation_interval=30"])
    assert config_lib.with_length(given, 80, selection=True) == given
    assert config_lib.with_length(config_lib.resolve("demo"), 80, selection=False).trainer == (
        config_lib.resolve("demo").trainer
    )


def test_each_training_has_its_automatic_length_but_the_control_that_of_the_student():
    override = "trainer.steps=null,human.batch_size=4,self_training.control=true"
    teacher = "self_training.teacher={human.batch_size: 16, trainer.steps: null}"
    overrides = [override + ",pseudo.batch_size=4", teacher]
    completed = lambda config: config_lib.with_length(config, 200, selection=False)  # noqa: E731

    def lengths_of(*more):
        config = config_lib.resolve("demo", overrides=[*overrides, *more])
        return {name: c.steps for name, c in config_lib.stages(config, completed).items()}

    assert lengths_of() == {"teacher": 1250, "student": 2500, "control": 2500}
    assert lengths_of("trainer.epochs=4") == {"teacher": 50, "student": 200, "control": 200}


@pytest.mark.parametrize(
    ("images", "batch"), [(1, 8), (99, 8), (100, 16), (2000, 16), (2001, 32), (118_000, 32)]
)
def test_automatic_batches_follow_from_the_images(images, batch):
    assert config_lib.default_batch_size(images) == batch
    config = config_lib.resolve("folder")
    stages = config_lib.stages(config, lambda c: config_lib.with_batches(c, images))
    sizes = {name: (c.human.batch, c.pseudo and c.pseudo.batch) for name, c in stages.items()}
    assert sizes == {
        "teacher": (batch, None), "student": (batch // 4, 3 * batch // 4), "control": (batch, None)
    }  # fmt: skip
    for done in stages.values():
        rates = done.optimizer.learning_rate, done.optimizer.warmup_learning_rate
        assert rates == pytest.approx((0.16 * batch / 16, 0.001 * batch / 16))
        assert config_lib.with_batches(done, 999) == done


def test_rates_are_scaled_to_the_batch_and_lengths_to_its_images():
    overrides = ["human.batch_size=2,pseudo.batch_size=6,trainer.epochs=4,optimizer.l2=1e-3"]
    steps = "optimizer={schedule: step, step_boundaries: [100], step_rates: [0.008]}"
    config = config_lib.resolve("folder", overrides=[*overrides, steps])
    done = config_lib.with_batches(config, 100)
    assert done.optimizer.learning_rate == 0.08 and done.optimizer.step_rates == (0.004,)
    assert done.optimizer.l2 == 1e-3
    assert config_lib.control_config(config, None).trainer.epochs == 16
    auto = config_lib.resolve("folder", overrides=["trainer.epochs=4"])
    assert config_lib.control_config(auto, None).trainer.epochs == 8
    plain = config_lib.resolve("demo")
    assert config_lib.with_batches(plain, 100) == plain


def test_the_halves_of_a_batch_are_automatic_together():
    for key in ("human", "pseudo"):
        with pytest.raises(UserError, match="auto or both numbers; set the other one"):
            config_lib.resolve("folder", overrides=[f"{key}.batch_size=4"])
    with pytest.raises(UserError, match="'atuo'; did you mean 'auto'"):
        config_lib.resolve("folder", overrides=["human.batch_size=atuo"])
    with pytest.raises(RuntimeError, match="call `with_batches`"):
        _ = config_lib.resolve("folder").images_per_step


def test_only_a_recipe_names_evaluation_images_that_may_be_missing(tmp_path):
    def from_labeled(*overrides):
        return config_lib.resolve("folder", overrides=overrides).evaluation.from_labeled

    assert from_labeled() == from_labeled("evaluation.batch_size=4") == 0.2
    assert from_labeled("evaluation.images=test") is None
    assert from_labeled("evaluation={images: test, from_labeled: 0.3}") == 0.3
    assert from_labeled("evaluation={images: null, annotations: null}") == 0.2
    assert from_labeled("evaluation.annotations=test.json", "trainer.seed=1") is None
    (tmp_path / "saved.yaml").write_text(config_lib.dump(config_lib.resolve("folder")))
    saved = config_lib.resolve(config_file=str(tmp_path / "saved.yaml"))
    assert saved.evaluation.from_labeled == 0.2
    with pytest.raises(UserError, match="from_labeled stands in for `images`, not for records"):
        config_lib.EvaluationConfig(records="a.tfrecord", from_labeled=0.2)


@pytest.mark.parametrize(
    "teacher",
    ["human.fraction: 0.5", "selection.seed: 1", "human: {fraction_seed: 3}", "selection: null"],
)
def test_the_stages_share_one_draw(teacher):
    overrides = ["selection={}", f"self_training.teacher={{{teacher}}}"]
    with pytest.raises(UserError, match="self_training.teacher: .* share one draw of labeled"):
        config_lib.resolve("demo", overrides=overrides)
    for own in ("selection.patience: 9", "trainer.seed: 5"):
        config_lib.resolve("demo", overrides=["selection={}", f"self_training.teacher={{{own}}}"])


def test_automatic_decay_is_for_short_runs():
    config = config_lib.resolve("demo", overrides=["trainer.steps=1000"])
    assert config.decay == pytest.approx(1 - 1 / 70)
    assert config.override({"self_training.decay": 0.9997}).decay == 0.9997


@pytest.mark.parametrize("arguments", [["--experiment=list"], ["--experiment=demoo"]])
def test_list_and_typo_answer_without_tensorflow(arguments):
    command = [sys.executable, "-X", "importtime", "-m", "official_selftrain.train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "absl.flags" in modules
    assert not modules & {"tensorflow", "keras"}
    assert "demo" in done.stdout + done.stderr
