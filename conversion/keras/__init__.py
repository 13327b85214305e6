"""HDF5 as Keras 2 and Keras 3 write it, and the presets of KerasHub."""
