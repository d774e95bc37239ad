"""Records, sources and the input pipelines, `tf.data` and NumPy."""
