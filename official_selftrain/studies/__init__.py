"""Studies: many runs that share their stages, and what they say together.

It imports neither Keras nor TensorFlow before the page is drawn: the stages are processes of their
own, and the memory is theirs.
"""

from official_selftrain.studies.study import Study

__all__ = ["Study"]
