"""Everything the pipeline raises on purpose.

PipelineError                what a person can act on; the command line prints it and exits with 2
├── ConfigError              the configuration does not describe a run
├── DataError                documents, tokenizer or shards are not what was asked for
├── StoreError               the store cannot be read or written
│   ├── MissingArtifact      an earlier stage has not been run
│   ├── DamagedArtifact      a file is torn or its bytes have changed
│   ├── NewerStore           written by a later version of this program
│   └── DiskFull             no room for what is being written
├── MismatchError            parts that were not made for each other
├── NotFiniteError           the loss became NaN or infinite
├── BudgetError              no way of running a job fits into the memory budget
└── JobsFailed               some jobs of a stage ended badly, the others are kept
Interrupted                  asked to stop; state is saved; the command line exits with 130
"""


class PipelineError(Exception):
    """Base of the errors a person can act on; the text says what to do."""


class ConfigError(PipelineError):
    """The configuration does not describe a run."""


class DataError(PipelineError):
    """Documents, tokenizer or shards are not what was asked for."""


class StoreError(PipelineError):
    """The store cannot be read or written."""


class MissingArtifact(StoreError):
    """An earlier stage has not been run."""


class DamagedArtifact(StoreError):
    """A file is torn or its bytes have changed."""


class NewerStore(StoreError):
    """The store was written by a later version of this program."""


class DiskFull(StoreError):
    """There is no room for what is being written."""


class MismatchError(PipelineError):
    """Parts that were not made for each other."""


class NotFiniteError(PipelineError):
    """The loss became NaN or infinite."""


class BudgetError(PipelineError):
    """No way of running a job fits into the memory budget."""


class JobsFailed(PipelineError):
    """Some jobs of a stage ended badly; the others are kept."""


class Interrupted(BaseException):
    """Asked to stop; the state is saved and the same command goes on from it."""
