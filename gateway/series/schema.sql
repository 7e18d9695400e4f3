-- series.db: a projection of the journal. Delete it and it is rebuilt; never edit it.
-- Times are ns since 1970 UTC; `stream` is the index of a stream in the order of its `open` entry.

CREATE TABLE about(name TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;

CREATE TABLE stream(
  id INTEGER PRIMARY KEY, stream BLOB NOT NULL UNIQUE, hello BLOB NOT NULL,
  generation INTEGER NOT NULL, rank INTEGER NOT NULL, kind TEXT NOT NULL,
  last_seq INTEGER NOT NULL, stored INTEGER NOT NULL, projected INTEGER NOT NULL,
  control INTEGER NOT NULL, quarantined INTEGER NOT NULL, gaps INTEGER NOT NULL,
  refused INTEGER NOT NULL, bad INTEGER NOT NULL, status TEXT NOT NULL, text TEXT NOT NULL, bye INTEGER NOT NULL,
  ended_ns INTEGER NOT NULL, quiet_ns INTEGER NOT NULL,
  last_step INTEGER NOT NULL, last_wall_ns INTEGER NOT NULL
) STRICT;

CREATE TABLE key(id INTEGER PRIMARY KEY, name TEXT NOT NULL, type TEXT NOT NULL) STRICT;
-- keys: u32 ids in the order of (name, type); rows: how many there are, sealed: of them in segments
CREATE TABLE keyset(
  id INTEGER PRIMARY KEY, keys BLOB NOT NULL,
  rows INTEGER NOT NULL DEFAULT 0, sealed INTEGER NOT NULL DEFAULT 0
) STRICT;
-- how a stream's schema lies in its key set; take: i64 indexes, empty for the same order
CREATE TABLE layout(
  stream INTEGER NOT NULL, schema INTEGER NOT NULL, keyset INTEGER NOT NULL, take BLOB NOT NULL,
  PRIMARY KEY(stream, schema)
) STRICT, WITHOUT ROWID;

-- rows as received: stream u64, seq u64, step i64, wall i64, then 8 bytes per key of the key set
CREATE TABLE tail(
  id INTEGER PRIMARY KEY, keyset INTEGER NOT NULL, n INTEGER NOT NULL, body BLOB NOT NULL
) STRICT;
CREATE INDEX tail_keyset ON tail(keyset, id);
-- rows sorted by (stream, seq), one packed column each; ordinal: number of the first row / seal size
CREATE TABLE segment(
  keyset INTEGER NOT NULL, ordinal INTEGER NOT NULL, level INTEGER NOT NULL, n INTEGER NOT NULL,
  streams BLOB NOT NULL, offsets BLOB NOT NULL,
  seq BLOB NOT NULL, step BLOB NOT NULL, wall BLOB NOT NULL,
  PRIMARY KEY(keyset, ordinal)
) STRICT;
CREATE TABLE col(
  key INTEGER NOT NULL, keyset INTEGER NOT NULL, ordinal INTEGER NOT NULL, vals BLOB NOT NULL,
  PRIMARY KEY(key, keyset, ordinal)
) STRICT;

CREATE TABLE text(
  stream INTEGER NOT NULL, seq INTEGER NOT NULL, wall INTEGER NOT NULL, step INTEGER,
  level TEXT NOT NULL, text TEXT NOT NULL, PRIMARY KEY(stream, seq)
) STRICT, WITHOUT ROWID;
-- kind: params | summary; body: the msgpack map that was logged
CREATE TABLE map(
  kind TEXT NOT NULL, stream INTEGER NOT NULL, seq INTEGER NOT NULL, wall INTEGER NOT NULL,
  body BLOB NOT NULL, PRIMARY KEY(kind, stream, seq)
) STRICT, WITHOUT ROWID;
-- sha256 is set when the last byte is here; lost says why it will never be
CREATE TABLE media(
  stream INTEGER NOT NULL, seq INTEGER NOT NULL, wall INTEGER NOT NULL, step INTEGER,
  what TEXT NOT NULL, key TEXT NOT NULL, name TEXT NOT NULL, meta BLOB NOT NULL,
  sha256 TEXT, size INTEGER, lost TEXT, rule TEXT NOT NULL DEFAULT '', PRIMARY KEY(stream, seq)
) STRICT, WITHOUT ROWID;

CREATE TABLE loss(
  stream INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, n INTEGER NOT NULL,
  reason TEXT NOT NULL
) STRICT;
CREATE TABLE quarantine(
  entry INTEGER NOT NULL, stream INTEGER, first INTEGER NOT NULL, n INTEGER NOT NULL,
  reason TEXT NOT NULL
) STRICT;
-- what passed, in order: never cut between two rows of one `entry` (a journal sequence number)
CREATE TABLE feed(
  id INTEGER PRIMARY KEY, entry INTEGER NOT NULL, kind TEXT NOT NULL, keyset INTEGER NOT NULL,
  stream INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, rule TEXT NOT NULL
) STRICT;
