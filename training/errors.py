"""The errors of training that a person can mend; the command line prints their message and nothing else."""


class TrainingError(Exception):
    """A recipe, data set or run that cannot go on; the message says what to do."""
