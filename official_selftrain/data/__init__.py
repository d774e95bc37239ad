"""Records, sources and the input pipelines, `tf.data` and NumPy."""

MEAN, STDDEV = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours, 0 to 1
