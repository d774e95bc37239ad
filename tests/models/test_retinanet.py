import keras
import numpy as np
import pytest

from official_selftrain import config
from official_selftrain.applications import spinenet
from official_selftrain.models import RetinaNet, build_detector, build_segmenter


def test_backbone_without_levels_is_refused():
    with pytest.raises(ValueError, match="dict of levels"):
        RetinaNet(keras.applications.MobileNetV2((64, 64, 3), include_top=False, weights=None), 3)


@pytest.mark.parametrize(
    ("build", "kind"),
    [(build_detector, config.DetectionConfig), (build_segmenter, config.SegmentationConfig)],
)
def test_a_config_without_its_number_of_classes_is_refused(build, kind):
    with pytest.raises(ValueError, match="The config has no `num_classes`"):
        build(kind())


def test_model_survives_saving(tmp_path):
    backbone = spinenet.SpineNet(
        "49S",
        include_top=False,
        input_shape=(64, 64, 3),
        stochastic_depth=0.2,
        sizes=spinenet.Variant(8, 0.125, 0.5, 1),
    )
    model = RetinaNet(backbone, 3, num_convs=1, num_filters=8)
    images = np.random.default_rng(0).standard_normal((1, 64, 64, 3)).astype("float32")
    model.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras")
    for key, value in model(images).items():
        np.testing.assert_array_equal(restored(images)[key], value)
