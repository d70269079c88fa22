//! An nginx that serves a directory and needs nothing of the system's. Also for the
//! benchmark, which takes this file as a module of its own.

use std::path::Path;

/// The nginx of the system, or the one that `make deps` puts below the target directory.
pub fn program() -> String {
    let executable = std::env::current_exe().expect("the path of this executable");
    let own = executable
        .ancestors()
        .map(|directory| directory.join("nginx/usr/sbin/nginx"))
        .find(|path| path.is_file());
    own.map_or("nginx".into(), |path| path.display().to_string())
}

/// Its configuration: it listens on `socket` in `place`, and logs each request to `log` in
/// there, in nginx's format `format`. `settings` are further ones for HTTP.
pub fn configuration(place: &Path, root: &Path, format: &str, settings: &str) -> String {
    let (place, root) = (place.display(), root.display());
    format!(
        "daemon off;
        # One process, so that to stop it is to stop all of it.
        master_process off;
        pid {place}/pid;
        error_log {place}/error.log;
        events {{}}
        http {{
            log_format asked '{format}';
            access_log {place}/log asked;
            {settings}
            client_body_temp_path {place}/tmp;
            proxy_temp_path {place}/tmp;
            fastcgi_temp_path {place}/tmp;
            uwsgi_temp_path {place}/tmp;
            scgi_temp_path {place}/tmp;
            server {{
                listen unix:{place}/socket;
                root {root};
            }}
        }}"
    )
}
