"""One-line defects of the encryption: (name, file under ``src/holdfast``, text, its replacement, pytest arguments).

``tests/mutants.py`` makes its ``Mutant`` of each.
"""

from __future__ import annotations

_ROWS = "tests/test_encrypted.py -k"
_WITNESS = "tests/test_encrypted_witness.py -k"
_KEYS = "tests/test_keyring.py -k"
_REKEY = "tests/test_rekey.py -k"

ENCRYPTED: list[tuple[str, str, str, str, str]] = [
    (
        "encryption: the scope is not bound",
        "encrypted.py",
        '("holdfast", FORMAT, scope, *key, key_id, *op)',
        '("holdfast", FORMAT, *key, key_id, *op)',
        f"{_ROWS} scope",
    ),
    (
        "encryption: the entity is not bound",
        "encrypted.py",
        '("holdfast", FORMAT, scope, *key, key_id, *op)',
        '("holdfast", FORMAT, scope, key.domain, key_id, *op)',
        f"{_ROWS} change_places",
    ),
    (
        "encryption: the op is not bound",
        "encrypted.py",
        '("holdfast", FORMAT, scope, *key, key_id, *op)',
        '("holdfast", FORMAT, scope, *key, key_id)',
        f"{_ROWS} another_op",
    ),
    (
        "encryption: the parts are bound without saying where each ends",
        "encrypted.py",
        'return _encode(("holdfast", FORMAT, scope, *key, key_id, *op))',
        'return ",".join(map(str, ("holdfast", FORMAT, scope, *key, key_id, *op))).encode()',
        f"{_ROWS} associated",
    ),
    (
        "encryption: another spelling of a row is taken",
        "encrypted.py",
        " or _encode(row) != payload:",
        ":",
        f"{_ROWS} 'flipped or spelling'",
    ),
    (
        "encryption: the op that stands in the open is not compared",
        "encrypted.py",
        "        if Op(*row.op) != record.op:\n",
        "        if False:\n",
        f"{_ROWS} flipped",
    ),
    (
        "encryption: a nonce comes again for another row of the same op",
        "encrypted.py",
        "nonce = secret.derive(_NONCE, bound + payload)[:_NONCE_BYTES]",
        "nonce = secret.derive(_NONCE, bound)[:_NONCE_BYTES]",
        f"{_ROWS} another_nonce",
    ),
    (
        "encryption: nonces are the same under every key",
        "encrypted.py",
        "nonce = secret.derive(_NONCE, bound + payload)[:_NONCE_BYTES]",
        "nonce = SecretKey('', bytes(32)).derive(_NONCE, (scope + str(key) + str(op)).encode() + payload)[:30]",
        f"{_ROWS} another_nonce",
    ),
    (
        "encryption: a plain row is taken for damage and moved",
        "encrypted.py",
        '            raise LockedError(\n                f"{key}: not encrypted',
        '            raise CorruptedError(\n                f"{key}: not encrypted',
        f"{_ROWS} plain_row",
    ),
    (
        "encryption: a row without its key is taken for damage and moved",
        "encrypted.py",
        '            raise LockedError(\n                f"{key}: encrypted under',
        '            raise CorruptedError(\n                f"{key}: encrypted under',
        f"{_ROWS} missing_key",
    ),
    (
        "encryption: the bytes of a damaged row are not handed up",
        "encrypted.py",
        "                error.record, error.backend = record, self._shown\n",
        "                error.backend = self._shown\n",
        f"{_ROWS} 'among_many'",
    ),
    (
        "encryption: a row without its mark is read by a store without keys",
        "domains.py",
        """        if payload.startswith(b'{"_encrypted":'):""",
        "        if False:",
        f"{_ROWS} without_the_keys",
    ),
    (
        "witness: it is asked after the read",
        "encrypted.py",
        "        for key, record in (await self.backend.read(scope, keys)).items():\n",
        "        records = await self.backend.read(scope, keys)\n"
        "        seen = {} if witness is None else witness.known(scope, keys)\n"
        "        for key, record in records.items():\n",
        f"{_WITNESS} overtakes",
    ),
    (
        "witness: a commit is noted before the store has it",
        "encrypted.py",
        "        number = await self.backend.commit(scope, sealed, expect, op=op)\n",
        "        if self.witness is not None:\n"
        "            self.witness.note_commit(scope, self.witness.floor(scope) + 1, changes, op)\n"
        "        number = await self.backend.commit(scope, sealed, expect, op=op)\n",
        f"{_WITNESS} not_noted",
    ),
    (
        "witness: older versions are not compared",
        "witness.py",
        "        if version < seen.version:\n",
        "        if False:\n",
        f"{_WITNESS} 'put_back'",
    ),
    (
        "witness: a writer's numbers are not compared",
        "witness.py",
        "if version > seen.version and op.writer == seen.writer and op.n <= seen.n:",
        "if False:",
        f"{_WITNESS} older_row_put_back",
    ),
    (
        "witness: the scope's number is not compared",
        "witness.py",
        "        if number < floor:\n",
        "        if False:\n",
        f"{_WITNESS} 'whole_store or falls_back'",
    ),
    (
        "witness: what another process noted is taken back",
        "witness.py",
        "        section = _section_of(whole, store)\n",
        "        section = whole.stores[store] = _Section({}, {})\n",
        f"{_WITNESS} share_a_witness",
    ),
    (
        "witness: what is noted while it is cut to its bound is forgotten",
        "witness.py",
        "                self._rows = {**kept, **noted}\n",
        "                self._rows = kept\n",
        f"{_WITNESS} noted_while",
    ),
    (
        "witness: renamed before it is synced",
        "witness.py",
        "        os.fsync(fd)  #",
        "        pass  #",
        f"{_WITNESS} takes_its_name",
    ),
    (
        "keys: what is not id=base64 is repeated",
        "keyring.py",
        'return {}, f"entry {number} is not id=base64, with',
        'return {}, f"entry {number} is not id=base64, but {entry}, with',
        f"{_KEYS} cannot_be_used",
    ),
    (
        "re-keying: a row is rewritten whatever its version",
        "rekeying.py",
        "        expect = {key: record.version for key, record in rows.items()}\n",
        "        expect: dict[Key, int] = {}\n",
        f"{_REKEY} meanwhile",
    ),
    (
        "re-keying: one pass is believed",
        "rekeying.py",
        "        if not stale:\n",
        "        if True:\n",
        f"{_REKEY} told_of",
    ),
    (
        "re-keying: any JSON is encrypted as a sound row",
        "rekeying.py",
        "            self.accept_plain(key, record.payload)\n",
        "            pass\n",
        f"{_REKEY} sound_ones",
    ),
    (
        "re-keying: scopes but the first are forgotten",
        "rekeying.py",
        "        for scope, keys in listed:\n",
        "        for scope, keys in [one for one in listed if one[0] == listed[0][0]]:\n",
        f"{_REKEY} every_scope",
    ),
    (
        "re-keying: a half encrypted store lets a plain bot in",
        "rekeying.py",
        "return 0 if key.domain == _FIRST else 2 if key.domain == _LAST else 1",
        "return 2 if key.domain == _LAST else 1",
        f"{_REKEY} lets_no_bot_in",
    ),
]
