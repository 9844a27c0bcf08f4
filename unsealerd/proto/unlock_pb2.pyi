# mypy: disable-error-code=type-arg
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Purpose(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PURPOSE_UNSPECIFIED: _ClassVar[Purpose]
    PURPOSE_UNLOCK: _ClassVar[Purpose]
    PURPOSE_DRILL: _ClassVar[Purpose]

class Curve(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CURVE_UNSPECIFIED: _ClassVar[Curve]
    CURVE_P256: _ClassVar[Curve]
    CURVE_X25519: _ClassVar[Curve]

class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATE_UNSPECIFIED: _ClassVar[State]
    STATE_UNINITIALISED: _ClassVar[State]
    STATE_LOCKED: _ClassVar[State]
    STATE_UNLOCKED: _ClassVar[State]
PURPOSE_UNSPECIFIED: Purpose
PURPOSE_UNLOCK: Purpose
PURPOSE_DRILL: Purpose
CURVE_UNSPECIFIED: Curve
CURVE_P256: Curve
CURVE_X25519: Curve
STATE_UNSPECIFIED: State
STATE_UNINITIALISED: State
STATE_LOCKED: State
STATE_UNLOCKED: State

class SessionRequest(_message.Message):
    __slots__ = ("hello", "answer")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    answer: Answer
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("challenge", "result")
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    challenge: Challenge
    result: Result
    def __init__(self, challenge: _Optional[_Union[Challenge, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "nonce", "tags", "purpose")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    version: int
    nonce: bytes
    tags: _containers.RepeatedScalarFieldContainer[bytes]
    purpose: Purpose
    def __init__(self, version: _Optional[int] = ..., nonce: _Optional[bytes] = ..., tags: _Optional[_Iterable[bytes]] = ..., purpose: _Optional[_Union[Purpose, str]] = ...) -> None: ...

class Question(_message.Message):
    __slots__ = ("tag", "curve", "point", "kdf")
    TAG_FIELD_NUMBER: _ClassVar[int]
    CURVE_FIELD_NUMBER: _ClassVar[int]
    POINT_FIELD_NUMBER: _ClassVar[int]
    KDF_FIELD_NUMBER: _ClassVar[int]
    tag: bytes
    curve: Curve
    point: bytes
    kdf: str
    def __init__(self, tag: _Optional[bytes] = ..., curve: _Optional[_Union[Curve, str]] = ..., point: _Optional[bytes] = ..., kdf: _Optional[str] = ...) -> None: ...

class Challenge(_message.Message):
    __slots__ = ("session", "questions", "lock_reason", "boot_id", "host_name", "uptime", "generation", "backup_time", "shares_present", "shares_needed", "deadline", "evidence")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    QUESTIONS_FIELD_NUMBER: _ClassVar[int]
    LOCK_REASON_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    HOST_NAME_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    BACKUP_TIME_FIELD_NUMBER: _ClassVar[int]
    SHARES_PRESENT_FIELD_NUMBER: _ClassVar[int]
    SHARES_NEEDED_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    questions: _containers.RepeatedCompositeFieldContainer[Question]
    lock_reason: str
    boot_id: str
    host_name: str
    uptime: int
    generation: int
    backup_time: int
    shares_present: int
    shares_needed: int
    deadline: int
    evidence: Evidence
    def __init__(self, session: _Optional[bytes] = ..., questions: _Optional[_Iterable[_Union[Question, _Mapping]]] = ..., lock_reason: _Optional[str] = ..., boot_id: _Optional[str] = ..., host_name: _Optional[str] = ..., uptime: _Optional[int] = ..., generation: _Optional[int] = ..., backup_time: _Optional[int] = ..., shares_present: _Optional[int] = ..., shares_needed: _Optional[int] = ..., deadline: _Optional[int] = ..., evidence: _Optional[_Union[Evidence, _Mapping]] = ...) -> None: ...

class Evidence(_message.Message):
    __slots__ = ("tls_pin",)
    TLS_PIN_FIELD_NUMBER: _ClassVar[int]
    tls_pin: TlsPin
    def __init__(self, tls_pin: _Optional[_Union[TlsPin, _Mapping]] = ...) -> None: ...

class TlsPin(_message.Message):
    __slots__ = ("fingerprint",)
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    fingerprint: bytes
    def __init__(self, fingerprint: _Optional[bytes] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("session", "shares", "reason", "accept_rollback")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_ROLLBACK_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    shares: _containers.RepeatedCompositeFieldContainer[Share]
    reason: str
    accept_rollback: bool
    def __init__(self, session: _Optional[bytes] = ..., shares: _Optional[_Iterable[_Union[Share, _Mapping]]] = ..., reason: _Optional[str] = ..., accept_rollback: _Optional[bool] = ...) -> None: ...

class Share(_message.Message):
    __slots__ = ("question", "x")
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    X_FIELD_NUMBER: _ClassVar[int]
    question: int
    x: bytes
    def __init__(self, question: _Optional[int] = ..., x: _Optional[bytes] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("state", "shares_present", "shares_needed", "outcomes", "answered", "missing", "seconds_left")
    STATE_FIELD_NUMBER: _ClassVar[int]
    SHARES_PRESENT_FIELD_NUMBER: _ClassVar[int]
    SHARES_NEEDED_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LEFT_FIELD_NUMBER: _ClassVar[int]
    state: State
    shares_present: int
    shares_needed: int
    outcomes: _containers.RepeatedCompositeFieldContainer[Outcome]
    answered: _containers.RepeatedScalarFieldContainer[str]
    missing: _containers.RepeatedScalarFieldContainer[str]
    seconds_left: int
    def __init__(self, state: _Optional[_Union[State, str]] = ..., shares_present: _Optional[int] = ..., shares_needed: _Optional[int] = ..., outcomes: _Optional[_Iterable[_Union[Outcome, _Mapping]]] = ..., answered: _Optional[_Iterable[str]] = ..., missing: _Optional[_Iterable[str]] = ..., seconds_left: _Optional[int] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("question", "result")
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    question: int
    result: str
    def __init__(self, question: _Optional[int] = ..., result: _Optional[str] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("state", "lock_reason", "shares_present", "shares_needed")
    STATE_FIELD_NUMBER: _ClassVar[int]
    LOCK_REASON_FIELD_NUMBER: _ClassVar[int]
    SHARES_PRESENT_FIELD_NUMBER: _ClassVar[int]
    SHARES_NEEDED_FIELD_NUMBER: _ClassVar[int]
    state: State
    lock_reason: str
    shares_present: int
    shares_needed: int
    def __init__(self, state: _Optional[_Union[State, str]] = ..., lock_reason: _Optional[str] = ..., shares_present: _Optional[int] = ..., shares_needed: _Optional[int] = ...) -> None: ...
