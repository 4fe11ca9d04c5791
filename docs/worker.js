// A worker in a hidden frame, for pages that are opened as files, where browsers allow no other:
// the search of this site runs in one.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.appendChild(this.frame);
      const inside = this.frame.contentWindow;
      window.addEventListener("message", (event) => {
        if (event.source !== inside) return;
        const copy = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(copy);
        if (this.onmessage) this.onmessage(copy);
      });
      inside.document.open();
      inside.document.write(`<body><script>
        const above = parent.postMessage.bind(parent);
        postMessage = (data) => above(data, "*");
        importScripts = (...urls) => urls.reduce((before, url) => before.then(() =>
          new Promise((done) => {
            const script = document.createElement("script");
            Object.assign(script, { src: url, onload: done });
            document.body.appendChild(script);
          })), Promise.resolve());
      <\/script><script src="${url}"><\/script>`);
      inside.document.close();
      this.ready = new Promise((done) => { inside.onload = done; });
    }
    postMessage(data) {
      const inside = this.frame.contentWindow;
      this.ready.then(() => inside.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() { this.frame.remove(); }
  };
}
