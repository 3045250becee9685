//! A real browser without a window: Chromium, through the protocol of its debugger.

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use base64::prelude::{Engine, BASE64_STANDARD};
use kit::net::{connect, eventually, Uninterrupted};
use serde_json::{json, Value};
use tungstenite::{Message, WebSocket};

/// A browser with one page. It ends with the test, however that ends.
pub struct Browser {
    child: Child,
    profile: PathBuf,
    socket: Option<WebSocket<Uninterrupted<TcpStream>>>,
    session: Option<Value>,
    next: u64,
    /// What the page complained of: exceptions, and what its policy forbade.
    pub complaints: Vec<String>,
}

impl Browser {
    /// Starts it, with a profile of its own.
    pub fn start(name: &str) -> Self {
        let process = std::process::id();
        let profile = std::env::temp_dir().join(format!("portcullis-{name}-{process}"));
        let mut command = Command::new("chromium");
        command
            // Without a sandbox it runs as root too, in a container.
            .args(["--headless", "--no-sandbox", "--disable-gpu"])
            .args(["--disable-dev-shm-usage", "--hide-scrollbars"])
            .arg("--remote-debugging-port=0")
            .arg(format!("--user-data-dir={}", profile.display()))
            .arg("about:blank")
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command.spawn().expect("it starts");
        let mut browser = Self {
            child,
            profile,
            socket: None,
            session: None,
            next: 0,
            complaints: Vec::new(),
        };
        let (addr, path) = browser.debugger();
        let url = format!("ws://{addr}{path}");
        let (socket, _) =
            tungstenite::client(url, Uninterrupted(connect(addr))).expect("a handshake");
        browser.socket = Some(socket);
        browser
    }

    /// The address that it writes into its profile, once it listens.
    fn debugger(&self) -> (SocketAddr, String) {
        let file = self.profile.join("DevToolsActivePort");
        let mut found = None;
        eventually("the debugger listens", || {
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            found = text.split_once('\n').and_then(|(port, path)| {
                let port = port.parse().ok()?;
                Some((SocketAddr::from(([127, 0, 0, 1], port)), path.to_owned()))
            });
            found.is_some()
        });
        found.expect("found")
    }

    /// Opens a page.
    pub fn open(&mut self, url: &str) {
        let target = self.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let attached = self.call("Target.attachToTarget", attach);
        self.session = Some(attached["sessionId"].clone());
        for domain in ["Runtime", "Log", "Page", "Performance"] {
            self.call(&format!("{domain}.enable"), json!({}));
        }
        self.call("Page.navigate", json!({ "url": url }));
        self.until("location.protocol === 'http:' && document.readyState === 'complete'");
    }

    /// One command, and its result.
    #[track_caller]
    pub fn call(&mut self, method: &str, parameters: Value) -> Value {
        let answer = self.answer(method, parameters);
        assert!(answer.get("error").is_none(), "{method}: {answer}");
        answer["result"].clone()
    }

    /// One command, and its answer: a result or an error.
    fn answer(&mut self, method: &str, parameters: Value) -> Value {
        self.next += 1;
        let id = self.next;
        let mut command = json!({ "id": id, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            command["sessionId"] = session.clone();
        }
        let socket = self.socket.as_mut().expect("connected");
        socket
            .send(Message::text(command.to_string()))
            .expect("sent");
        loop {
            let Message::Text(text) = socket.read().expect("the debugger answers") else {
                continue;
            };
            let answer: Value = serde_json::from_str(&text).expect("JSON");
            if answer["id"] == id {
                return answer;
            }
            let is_complaint = match answer["method"].as_str() {
                Some("Runtime.exceptionThrown") => true,
                Some("Log.entryAdded") => answer["params"]["entry"]["level"] == "error",
                _ => false,
            };
            if is_complaint {
                self.complaints.push(answer["params"].to_string());
            }
        }
    }

    /// The value of an expression in the page.
    #[track_caller]
    pub fn eval(&mut self, expression: &str) -> Value {
        let result = self.call("Runtime.evaluate", evaluate(expression));
        let exception = result.get("exceptionDetails");
        assert!(exception.is_none(), "{expression}: {result}");
        result["result"]["value"].clone()
    }

    /// Waits until an expression is true in the page. Between two pages there may be no document.
    #[track_caller]
    pub fn until(&mut self, expression: &str) {
        eventually(expression, || {
            let answer = self.answer("Runtime.evaluate", evaluate(expression));
            answer["result"]["result"]["value"] == true
        });
    }

    /// A picture of the page, `width` pixels wide.
    pub fn screenshot(&mut self, file: &Path, width: u32, height: u32) {
        let size =
            json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", size);
        let picture = self.call("Page.captureScreenshot", json!({ "format": "png" }));
        let bytes = BASE64_STANDARD.decode(picture["data"].as_str().expect("data"));
        std::fs::write(file, bytes.expect("base64")).expect("written");
    }

    /// What the system prefers: `dark` or `light`.
    pub fn prefer(&mut self, scheme: &str) {
        let feature = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": feature }));
    }

    /// The bytes of the page's heap, without garbage, and the number of its nodes.
    pub fn weight(&mut self) -> (u64, u64) {
        self.call("HeapProfiler.collectGarbage", json!({}));
        let metrics = self.call("Performance.getMetrics", json!({}));
        let metric = |name: &str| {
            let mut all = metrics["metrics"].as_array().expect("metrics").iter();
            let found = all.find(|metric| metric["name"] == name).expect("found");
            found["value"].as_f64().expect("a number") as u64
        };
        (metric("JSHeapUsedSize"), metric("Nodes"))
    }
}

fn evaluate(expression: &str) -> Value {
    json!({ "expression": expression, "returnByValue": true, "awaitPromise": true })
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.profile);
    }
}
