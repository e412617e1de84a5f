"""Raw columns -> ids -> tf.Example -> tf.data; knows no model."""
