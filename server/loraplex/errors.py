"""The errors of loraplex. No word of HTTP here: `loraplex.api.errors` maps classes to status codes.

    LoraplexError
    ├── InvalidRequest              the request cannot be served as it is written
    │   ├── InvalidName             a name outside the grammar
    │   ├── SourceRefused           an adapter from where the operator does not allow it
    │   └── ContextLengthExceeded   prompt + max_tokens do not fit the model
    ├── ModelNotFound               no base, adapter, version or route of that name
    ├── RouteChanged                somebody changed the route since the caller looked at it
    ├── RouteRefused                the route's gate, or what is going on with it, does not allow the change
    ├── AdapterError                about the files or the life of one adapter
    │   ├── AdapterInvalid          not a LoRA for this base, or not one we understand exactly
    │   ├── PickleRefused           weights in a format that can run code
    │   ├── AdapterTooLarge         more bytes than this server accepts
    │   ├── AdapterConflict         the name is taken
    │   ├── AdapterLoadFailed       an accepted adapter could not be read back (disk, corruption)
    │   ├── NotMergeable            no merged weights can be made of it, or not by this server as it was started
    │   └── AdapterQuarantined      an accepted adapter gave NaN while it ran, and is not served until that is seen to
    ├── SourceFailed                an adapter could not be fetched from where it is
    │   ├── SourceNotFound          there is nothing
    │   └── SourceUnavailable       for now; another try may help
    ├── InsufficientMemory          what was asked for needs more memory than there is
    ├── StorageFull                 the disk refuses
    ├── Overloaded                  the waiting queue is full; try again later
    │   └── ProofTimedOut           the engine had no time to prove an adapter
    ├── NotReady                    starting, draining or dead
    ├── RequestFailed               an accepted request ended with an error inside the engine
    └── StartupError                a setting, model or device the server cannot start with
        └── UnsupportedModel        an architecture refused by name

Every message says what is wrong, why, and what to do next.
"""


class LoraplexError(Exception):
    """Root. `message` is shown to the user; `code` is a stable machine-readable word."""

    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(LoraplexError):
    code = "invalid_request"


class InvalidName(InvalidRequest):
    code = "invalid_name"


class SourceRefused(InvalidRequest):
    code = "source_not_allowed"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class ModelNotFound(LoraplexError):
    code = "model_not_found"


class RouteChanged(LoraplexError):
    code = "route_changed"


class RouteRefused(LoraplexError):
    """The route's gate is closed to a target, or its evaluation set is being run already."""

    code = "gate_closed"


class AdapterError(LoraplexError):
    code = "adapter_error"


class AdapterInvalid(AdapterError):
    code = "adapter_invalid"


class PickleRefused(AdapterError):
    code = "pickle_refused"


class AdapterTooLarge(AdapterError):
    code = "request_too_large"


class AdapterConflict(AdapterError):
    code = "adapter_conflict"


class AdapterLoadFailed(AdapterError):
    code = "adapter_load_failed"


class AdapterQuarantined(AdapterError):
    code = "adapter_quarantined"


class NotMergeable(AdapterError):
    """No merged weights can be made of this adapter, or not by this server as it was started."""

    code = "not_mergeable"


class SourceFailed(LoraplexError):
    code = "source_failed"


class SourceNotFound(SourceFailed):
    code = "source_not_found"


class SourceUnavailable(SourceFailed):
    """The place did not answer, or broke off: another try may help."""


class InsufficientMemory(LoraplexError):
    """What was asked for needs more memory than there is."""

    code = "insufficient_memory"


class StorageFull(LoraplexError):
    code = "insufficient_storage"


class Overloaded(LoraplexError):
    """`retry_after`: seconds after which another try is sensible."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after: int = 1):
        super().__init__(message)
        self.retry_after = retry_after


class ProofTimedOut(Overloaded):
    code = "proof_timeout"


class NotReady(LoraplexError):
    code = "not_ready"


class RequestFailed(LoraplexError):
    code = "engine_error"


class StartupError(LoraplexError):
    code = "startup_error"


class UnsupportedModel(StartupError):
    code = "unsupported_model"
