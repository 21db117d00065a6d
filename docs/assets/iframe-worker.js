// Opened as a file, a page may start no worker: the search then runs in a hidden frame.
if (location.protocol === "file:")
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
      this.ready = new Promise((resolve) => {
        inside.document.open();
        inside.document.write(
          "<script>postMessage = (data) => parent.postMessage(data, '*');" +
          "importScripts = (...all) => all.reduce((before, one) => before.then(() => new Promise((done) => {" +
          "const script = document.createElement('script'); script.src = one; script.onload = done;" +
          "document.body.appendChild(script); })), Promise.resolve());<\/script>" +
          `<body><script src="${url}"><\/script></body>`
        );
        inside.document.close();
        inside.addEventListener("load", resolve);
      });
    }
    postMessage(data) {
      this.ready.then(() =>
        this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
      );
    }
    terminate() {
      this.frame.remove();
    }
  };
