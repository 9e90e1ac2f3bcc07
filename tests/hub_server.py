"""A small Hub on loopback, with what huggingface_hub asks for to push and pull a model. For tests alone."""
import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = 'hf_test'
LFS_FROM = 10 * 2 ** 10  # bytes; smaller files travel within the commit


class Hub:
    """State of the server, and the faults that a test asks for.

    `faults` maps a part of a path to what happens there: a status, or 'cut', 'corrupt' or 'slow'.
    """

    def __init__(self):
        self.repos, self.objects, self.faults, self.requests = {}, {}, {}, []

    def fault(self, path):
        return next((fault for part, fault in self.faults.items() if part in path), None)

    def commit(self, repo):
        files = self.repos[repo]['files']
        return hashlib.sha1(repr(sorted((name, file['oid']) for name, file in files.items())).encode()).hexdigest()


def git_hash(content):
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub: Hub

    def log_message(self, *args):
        pass

    def answer(self, status, content=b'', **headers):
        if not isinstance(content, bytes):
            content, headers['Content-Type'] = json.dumps(content).encode(), 'application/json'
        self.send_response(status)
        headers.setdefault('Content-Length', str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that waits no longer
                self.wfile.write(content)

    def handle_request(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        self.hub.requests.append((self.command, path))
        fault = None if path == '/set-faults' else self.hub.fault(path)
        if isinstance(fault, int):
            codes = {404: 'RepoNotFound', 401: 'RepoNotFound'}
            self.answer(fault, {'error': 'as asked'}, **({'X-Error-Code': codes[fault]} if fault in codes else {}))
            return
        if fault == 'slow' and self.command != 'HEAD':
            time.sleep(1.5)
        for method, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                handler(self, *match.groups(), **({'body': body} if 'P' in method else {}))
                return
        self.answer(404, {'error': f'no route {self.command} {path} {parse_qs(url.query)}'})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def allowed(self, repo=None):
        """Answer 401 where the token or the repository is missing, as the Hub does."""
        known = repo is None or repo in self.hub.repos
        may = self.headers.get('Authorization') == f'Bearer {TOKEN}'
        if repo is not None and known and not self.hub.repos[repo]['private']:
            may = True
        if may and known:
            return True
        self.answer(401 if not may else 404, {'error': 'Repository not found'}, **{'X-Error-Code': 'RepoNotFound'})
        return False

    def set_faults(self, body):
        self.hub.faults = json.loads(body)
        self.answer(200)

    def whoami(self):
        if self.allowed():
            self.answer(200, {'name': 'someone', 'type': 'user', 'orgs': []})

    def create(self, body):
        if not self.allowed():
            return
        options = json.loads(body)
        repo = f'{options.get("organization") or "someone"}/{options["name"]}'
        if repo in self.hub.repos:
            self.answer(409, {'error': 'exists', 'url': f'{self.base}/{repo}'})
            return
        private = options.get('private') or options.get('visibility') == 'private'
        self.hub.repos[repo] = dict(private=bool(private), files={})
        self.answer(200, {'url': f'{self.base}/{repo}', 'name': repo, 'id': repo})

    @property
    def base(self):
        return f'http://{self.headers["Host"]}'

    def validate(self, body):
        self.answer(200, {'errors': [], 'warnings': []})

    def preupload(self, repo, body):
        if self.allowed(repo):
            files = json.loads(body)['files']
            self.answer(200, {'files': [
                dict(path=file['path'], shouldIgnore=False, uploadMode='lfs' if file['size'] > LFS_FROM else 'regular')
                for file in files]})

    def lfs_batch(self, repo, body):
        if not self.allowed():
            return
        objects = [
            dict(item, **({} if item['oid'] in self.hub.objects else {
                'actions': {'upload': {'href': f'{self.base}/lfs/{item["oid"]}', 'header': {}}}}))
            for item in json.loads(body)['objects']]
        self.answer(200, {'transfer': 'basic', 'objects': objects})

    def lfs_put(self, oid, body):
        if hashlib.sha256(body).hexdigest() != oid:
            self.answer(400, {'error': 'wrong hash'})
            return
        self.hub.objects[oid] = body
        self.answer(200)

    def make_commit(self, repo, body):
        if not self.allowed() or not self.allowed(repo):
            return
        files = self.hub.repos[repo]['files']
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry['value']
            if entry['key'] == 'file':
                content = base64.b64decode(value['content'])
                files[value['path']] = dict(content=content, oid=git_hash(content), lfs=False)
            elif entry['key'] == 'lfsFile':
                files[value['path']] = dict(content=self.hub.objects[value['oid']], oid=value['oid'], lfs=True)
        commit = self.hub.commit(repo)
        self.answer(200, {'commitUrl': f'{self.base}/{repo}/commit/{commit}', 'commitOid': commit, 'success': True})

    def info(self, repo, revision=None):
        if self.allowed(repo):
            files = self.hub.repos[repo]['files']
            self.answer(200, {
                'id': repo, 'modelId': repo, 'sha': self.hub.commit(repo), 'private': self.hub.repos[repo]['private'],
                'tags': [], 'downloads': 0, 'likes': 0, 'siblings': [{'rfilename': name} for name in files]})

    def tree(self, repo, revision):
        if self.allowed(repo):
            self.answer(200, [
                dict(type='file', path=name, size=len(file['content']), oid=git_hash(file['content']), **(
                    {'lfs': {'oid': file['oid'], 'size': len(file['content']), 'pointerSize': 130}}
                    if file['lfs'] else {}))
                for name, file in sorted(self.hub.repos[repo]['files'].items())])

    def resolve(self, repo, revision, name):
        if not self.allowed(repo):
            return
        commit, file = self.hub.commit(repo), self.hub.repos[repo]['files'].get(name)
        headers = {'X-Repo-Commit': commit}
        if file is None or revision not in ('main', commit):
            code = 'EntryNotFound' if file is None else 'RevisionNotFound'
            self.answer(404, {'error': 'not found'}, **headers, **{'X-Error-Code': code})
            return
        content = file['content']
        headers.update({'ETag': f'"{file["oid"]}"', 'Accept-Ranges': 'bytes'})
        if file['lfs']:
            headers.update({'X-Linked-Etag': f'"{file["oid"]}"', 'X-Linked-Size': str(len(content))})
        fault = self.hub.fault(name) if self.command == 'GET' else None
        if fault == 'corrupt':
            content = content[:-1] + bytes([content[-1] ^ 1])
        first = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
        status = 200
        if first:
            start, end = int(first[1]), int(first[2] or len(content) - 1)
            headers['Content-Range'] = f'bytes {start}-{end}/{len(content)}'
            content, status = content[start:end + 1], 206
        if fault == 'cut':
            headers['Content-Length'] = str(len(content))
            self.answer(status, content[:len(content) // 2], **headers)
            self.close_connection = True
            self.connection.close()
            return
        if self.command == 'HEAD':
            headers['Content-Length'] = str(len(content))
        self.answer(status, content, **headers)


NAME = r'([\w.-]+/[\w.-]+)'
ROUTES = [
    (('POST', 'P'), '/set-faults', Handler.set_faults),
    (('GET',), '/api/whoami-v2', Handler.whoami),
    (('POST', 'P'), '/api/repos/create', Handler.create),
    (('POST', 'P'), '/api/validate-yaml', Handler.validate),
    (('POST', 'P'), f'/api/models/{NAME}/preupload/main', Handler.preupload),
    (('POST', 'P'), f'/{NAME}[.]git/info/lfs/objects/batch', Handler.lfs_batch),
    (('PUT', 'P'), '/lfs/([0-9a-f]{64})', Handler.lfs_put),
    (('POST', 'P'), f'/api/models/{NAME}/commit/main', Handler.make_commit),
    (('GET',), f'/api/models/{NAME}', Handler.info),
    (('GET',), f'/api/models/{NAME}/revision/([^/]+)', Handler.info),
    (('GET',), f'/api/models/{NAME}/tree/([^/]+)', Handler.tree),
    (('GET', 'HEAD'), f'/{NAME}/resolve/([^/]+)/(.+)', Handler.resolve),
]


@contextlib.contextmanager
def serve():
    """A running Hub and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(('127.0.0.1', 0), type('HubHandler', (Handler,), {'hub': hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()


if __name__ == '__main__':
    with serve() as (state, address):
        print(address, flush=True)
        while True:
            time.sleep(1)
