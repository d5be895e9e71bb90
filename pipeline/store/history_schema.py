"""The tables of history.db, and what is written to them; docs/history.md says what they hold."""

# Raised when a table comes to hold something else: an index of another version is made anew.
VERSION = 3

SCHEMA = """
-- what was read for the rest, so that only what has changed is read again
CREATE TABLE files (
    path TEXT PRIMARY KEY,      -- below the store
    kind TEXT NOT NULL,         -- history, artifact, root, served, costs, experiments
    subject TEXT NOT NULL,      -- an address, or which run, command or experiments
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    wrong TEXT NOT NULL         -- what is wrong with it, in a sentence; empty where nothing is
) WITHOUT ROWID;

CREATE TABLE runs (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    family TEXT NOT NULL,
    begun TEXT NOT NULL,        -- ISO 8601, UTC; the last time
    file TEXT NOT NULL,         -- its configuration as typed
    overrides TEXT NOT NULL,    -- as typed, a JSON list
    removed INTEGER NOT NULL    -- 1 while it is being removed
) WITHOUT ROWID;

-- every address that a run could lead to, made or not
CREATE TABLE run_addresses (
    run TEXT NOT NULL,
    address TEXT NOT NULL,
    PRIMARY KEY (run, address)
) WITHOUT ROWID;
CREATE INDEX runs_of_address ON run_addresses (address);

-- what is whole in the store
CREATE TABLE artifacts (
    address TEXT PRIMARY KEY,
    stage TEXT NOT NULL,
    item TEXT,
    made TEXT NOT NULL,         -- ISO 8601, UTC
    seconds REAL,               -- wall-clock of the job that made it
    bytes INTEGER NOT NULL,
    machine TEXT NOT NULL       -- GPU, else processor
) WITHOUT ROWID;

-- every number in the manifest of an artifact, by a dotted path
CREATE TABLE results (
    address TEXT NOT NULL,
    key TEXT NOT NULL,
    value REAL,
    PRIMARY KEY (address, key)
) WITHOUT ROWID;

-- the history of a job, in figures
CREATE TABLE histories (
    address TEXT PRIMARY KEY,
    rows INTEGER NOT NULL,
    last_step INTEGER NOT NULL,
    steps INTEGER NOT NULL,     -- of the whole training; 0 where it does not say
    first_time REAL,            -- seconds since 1970
    last_time REAL,
    torn INTEGER NOT NULL,      -- 1 where the last line is not whole
    missing TEXT NOT NULL       -- what is not there, in words
) WITHOUT ROWID;

-- every number that rows of a history have, by a dotted path
CREATE TABLE series (
    address TEXT NOT NULL,
    key TEXT NOT NULL,
    rows INTEGER NOT NULL,
    first REAL NOT NULL,
    last REAL NOT NULL,
    low REAL NOT NULL,
    low_step INTEGER NOT NULL,
    high REAL NOT NULL,
    high_step INTEGER NOT NULL,
    PRIMARY KEY (address, key)
) WITHOUT ROWID;

CREATE TABLE validations (
    address TEXT NOT NULL,
    step INTEGER NOT NULL,
    tokens INTEGER,
    epoch REAL,
    time REAL,
    nats REAL,                  -- cross-entropy, nats per token
    PRIMARY KEY (address, step)
) WITHOUT ROWID;

CREATE TABLE evaluations (
    address TEXT PRIMARY KEY,
    run TEXT NOT NULL,          -- its name
    family TEXT NOT NULL,
    made TEXT NOT NULL,
    passed INTEGER NOT NULL,    -- criteria that were met
    failed INTEGER NOT NULL,
    untold INTEGER NOT NULL     -- criteria for which too little was measured
) WITHOUT ROWID;

CREATE TABLE scores (
    address TEXT NOT NULL,
    place INTEGER NOT NULL,     -- in the report's order
    name TEXT NOT NULL,
    measure TEXT NOT NULL,      -- bits per byte, accuracy, score
    value REAL NOT NULL,
    serves INTEGER NOT NULL,    -- 1 for what the run serves
    PRIMARY KEY (address, place)
) WITHOUT ROWID;

-- bundles that `deploy` left
CREATE TABLE deploys (
    address TEXT PRIMARY KEY,
    made TEXT NOT NULL,
    bytes INTEGER NOT NULL
) WITHOUT ROWID;

-- experiments files whose results are in the store
CREATE TABLE experiments (
    name TEXT PRIMARY KEY,
    made TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE trials (
    experiments TEXT NOT NULL,
    place INTEGER NOT NULL,     -- in the results' order
    name TEXT NOT NULL,
    makes TEXT NOT NULL,        -- stack, joint NAME, dense NAME
    origin TEXT NOT NULL,       -- the grid or search that it is of, empty for neither
    is_dense INTEGER NOT NULL,  -- 1 for the one that others are held against
    tokens TEXT NOT NULL,       -- the same where losses a token compare
    valid REAL,                 -- nats a token, mean over seeds
    spread REAL,                -- standard deviation over seeds
    bits_per_byte REAL,         -- of held-out documents, mean over seeds
    gap REAL,                   -- validation less training loss
    passed INTEGER NOT NULL,    -- criteria that were met
    failed INTEGER NOT NULL,
    untold INTEGER NOT NULL,    -- criteria that could not be told
    PRIMARY KEY (experiments, place)
) WITHOUT ROWID;

-- each trial with each seed
CREATE TABLE trial_runs (
    experiments TEXT NOT NULL,
    trial TEXT NOT NULL,
    seed INTEGER NOT NULL,
    state TEXT NOT NULL,        -- done, pruned, failed, missing
    address TEXT NOT NULL,      -- of the model, empty where its settings describe none
    PRIMARY KEY (experiments, trial, seed)
) WITHOUT ROWID;

-- bundles that were named to be served on Modal
CREATE TABLE served (
    address TEXT PRIMARY KEY,
    at TEXT NOT NULL,           -- since when, empty where it is not known
    current INTEGER NOT NULL    -- 1 for the one that is served
) WITHOUT ROWID;

-- commands on Modal
CREATE TABLE commands (
    id TEXT PRIMARY KEY,
    typed TEXT NOT NULL,
    begun TEXT NOT NULL,
    ended TEXT NOT NULL,        -- empty while it goes on, and where it was lost
    prices TEXT NOT NULL,       -- when those were checked by which it is priced
    seconds REAL NOT NULL,      -- of its containers, together
    usd REAL NOT NULL,
    estimated_usd REAL NOT NULL
) WITHOUT ROWID;

-- what the jobs of a command were paid for, and what handed them out, which has no address and is
-- told in equal parts of the runs that the command was for
CREATE TABLE spent (
    command TEXT NOT NULL,
    stage TEXT NOT NULL,
    address TEXT NOT NULL,
    run TEXT NOT NULL,          -- empty for a job: run_addresses has its runs
    seconds REAL NOT NULL,      -- of containers, those that were lost too
    usd REAL NOT NULL,
    estimated_usd REAL,
    PRIMARY KEY (command, stage, address, run)
) WITHOUT ROWID;
CREATE INDEX spent_on_address ON spent (address);
"""

# Tables with rows of a file, by its kind, and the column that says of which
OF_KIND = {
    "history": (("histories", "address"), ("series", "address"), ("validations", "address")),
    "artifact": (
        ("artifacts", "address"),
        ("results", "address"),
        ("evaluations", "address"),
        ("scores", "address"),
        ("deploys", "address"),
    ),
    "root": (("runs", "id"), ("run_addresses", "run")),
    "served": (),
    "costs": (("commands", "id"), ("spent", "command")),
    "experiments": (
        ("experiments", "name"),
        ("trials", "experiments"),
        ("trial_runs", "experiments"),
    ),
}
