"""Classifiers made of a few labelled examples on the vectors of an encoder that stays as it is."""
