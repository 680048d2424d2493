"""The catalogue's tables.

Whatever many rows have in common is a row of its own with an integer for its key, so that an adapter takes a few hundred
bytes, indexes included. References are declared for `PRAGMA foreign_key_check` only: to enforce them would need an index
more for each. Instead `uses` counts the references to a row, and every change keeps it.

Adapters are numbered in the order in which they were created, so the order of `create_time` needs no index.
"""

from __future__ import annotations

SCHEMA_VERSION = 3

TABLES = """
CREATE TABLE classes (
    class INTEGER PRIMARY KEY, family TEXT NOT NULL, base_fingerprint TEXT NOT NULL, UNIQUE (family, base_fingerprint)
);
CREATE INDEX classes_by_base ON classes (base_fingerprint);
CREATE TABLE kinds (
    kind INTEGER PRIMARY KEY, class INTEGER NOT NULL REFERENCES classes, module_count INTEGER NOT NULL,
    parameter_count INTEGER NOT NULL, base_model_name_or_path TEXT NOT NULL, warnings TEXT NOT NULL, basis TEXT NOT NULL,
    uses INTEGER NOT NULL CHECK (uses >= 0),
    UNIQUE (class, module_count, parameter_count, base_model_name_or_path, warnings, basis)
);
CREATE TABLE packs (
    pack INTEGER PRIMARY KEY, size INTEGER NOT NULL, live_bytes INTEGER NOT NULL CHECK (live_bytes >= 0),
    live_count INTEGER NOT NULL CHECK (live_count >= 0)
);
CREATE TABLE blobs (
    blob INTEGER PRIMARY KEY, digest BLOB NOT NULL, pack INTEGER NOT NULL REFERENCES packs, start INTEGER NOT NULL,
    length INTEGER NOT NULL, quarantined INTEGER NOT NULL, uses INTEGER NOT NULL CHECK (uses >= 0),
    kind INTEGER REFERENCES kinds, resident_bytes INTEGER
);
CREATE UNIQUE INDEX blobs_by_digest ON blobs (digest);
CREATE INDEX blobs_in_packs ON blobs (pack, start) WHERE pack > 0;
CREATE INDEX blobs_in_files ON blobs (pack, digest) WHERE pack = 0;
CREATE INDEX blobs_unused ON blobs (uses) WHERE uses = 0;
CREATE INDEX blobs_quarantined ON blobs (quarantined) WHERE quarantined = 1;
CREATE TABLE version_shared (
    version INTEGER NOT NULL REFERENCES blobs, shared INTEGER NOT NULL REFERENCES blobs, PRIMARY KEY (version, shared)
) WITHOUT ROWID;
CREATE TABLE adapters (
    adapter INTEGER PRIMARY KEY, id TEXT NOT NULL, uid BLOB NOT NULL, version INTEGER NOT NULL REFERENCES blobs,
    previous INTEGER REFERENCES blobs, pinned INTEGER NOT NULL, labels TEXT, tenant TEXT, create_time INTEGER NOT NULL,
    update_time INTEGER NOT NULL, used_time INTEGER NOT NULL, revision INTEGER NOT NULL, size_bytes INTEGER NOT NULL,
    class INTEGER NOT NULL REFERENCES classes
);
CREATE UNIQUE INDEX adapters_by_id ON adapters (id);
CREATE INDEX adapters_by_update_time ON adapters (update_time);
CREATE INDEX adapters_by_used_time ON adapters (used_time);
CREATE INDEX adapters_by_size ON adapters (size_bytes);
CREATE INDEX adapters_by_version ON adapters (version);
CREATE INDEX adapters_by_class ON adapters (class, id);
CREATE INDEX adapters_pinned ON adapters (pinned, id) WHERE pinned = 1;
CREATE INDEX tenants_by_id ON adapters (tenant, id) WHERE tenant IS NOT NULL;
CREATE INDEX tenants_by_create_time ON adapters (tenant) WHERE tenant IS NOT NULL;
CREATE INDEX tenants_by_update_time ON adapters (tenant, update_time) WHERE tenant IS NOT NULL;
CREATE INDEX tenants_by_used_time ON adapters (tenant, used_time) WHERE tenant IS NOT NULL;
CREATE INDEX tenants_by_size ON adapters (tenant, size_bytes) WHERE tenant IS NOT NULL;
CREATE TABLE adapter_versions (
    adapter INTEGER NOT NULL REFERENCES adapters, sequence INTEGER NOT NULL, version INTEGER NOT NULL REFERENCES blobs,
    PRIMARY KEY (adapter, sequence)
) WITHOUT ROWID;
CREATE TABLE labels (
    key TEXT NOT NULL, value TEXT NOT NULL, id TEXT NOT NULL, PRIMARY KEY (key, value, id)
) WITHOUT ROWID;
CREATE TABLE counters (adapters INTEGER NOT NULL, versions INTEGER NOT NULL);
INSERT INTO counters VALUES (0, 0);
CREATE TABLE identity (store BLOB NOT NULL);
INSERT INTO identity VALUES (randomblob(16));
INSERT INTO packs VALUES (0, 0, 0, 0);
"""
