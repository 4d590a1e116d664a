// The interactive viewer of a volume: NiiVue, with the controls of the element around its canvas.

const WITH_WEBGL = "with-webgl2";
const STEPS = {
  ArrowLeft: [1, 0, 0],
  ArrowRight: [-1, 0, 0],
  PageUp: [0, 1, 0],
  PageDown: [0, -1, 0],
  ArrowUp: [0, 0, 1],
  ArrowDown: [0, 0, -1],
};
const PLANES = ["sagittal", "coronal", "axial"];
const DRAG = { crosshair: "crosshair", window: "windowing", distance: "measurement", pan: "pan" };
let shown = null;
let library = null;

function hasWebGL2() {
  const context = document.createElement("canvas").getContext("webgl2");
  context?.getExtension("WEBGL_lose_context")?.loseContext();
  return Boolean(context);
}

function loadNiiVue() {
  library ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = new URL("niivue.umd.js", import.meta.url);
    script.onload = () => resolve(globalThis.niivue);
    script.onerror = () => reject(new Error("NiiVue was not loaded"));
    document.head.append(script);
  });
  return library;
}

class Viewer extends HTMLElement {
  loading = Promise.resolve();

  connectedCallback() {
    this.abort = new AbortController();
    this.canvas = this.querySelector("canvas");
    // NiiVue focuses the canvas while the mouse drags, and scrolling would move what is dragged.
    this.canvas.focus = () => HTMLElement.prototype.focus.call(this.canvas, { preventScroll: true });
    this.listen(this.canvas, "keydown", (event) => this.onKey(event));
    this.listen(this.canvas, "pointermove", (event) => this.onPointer(event));
    this.listen(this.canvas, "pointerleave", () => this.write("pointer", ""));
    this.listen(this.canvas, "webglcontextlost", () => this.fallBack());
    this.listen(this, "input", (event) => this.onInput(event.target));
    this.listen(this, "click", (event) => this.onClick(event.target.closest("button")));
    this.querySelector("[name=full-screen]").hidden = !document.fullscreenEnabled;
    if (shown) this.show();
  }

  disconnectedCallback() {
    this.abort.abort();
    this.close();
    // Gradio removes the element of a former result and creates one for the next before it is known.
    shown = null;
  }

  listen(target, type, listener) {
    target.addEventListener(type, listener, { signal: this.abort.signal });
  }

  write(name, text) {
    this.querySelector(`output[name=${name}]`).textContent = text;
  }

  close() {
    const closed = this.nv;
    this.nv = null;
    closed?.cleanup();
    closed?.gl?.getExtension("WEBGL_lose_context")?.loseContext();
  }

  fallBack() {
    if (this.abort.signal.aborted) return;
    document.documentElement.classList.remove(WITH_WEBGL);
  }

  /** Show the last files, after those that are being loaded: NiiVue would mix the volumes of loads that overlap. */
  show() {
    this.loading = this.loading.then(() => this.load());
  }

  async load() {
    const files = shown;
    if (!files || this.abort.signal.aborted) return;
    const { volume, std, stdMaxHU } = files;
    this.dataset.state = "loading";
    for (const output of this.querySelectorAll("output")) output.textContent = "";
    try {
      const niivue = await loadNiiVue();
      if (this.abort.signal.aborted) return;
      if (!this.nv) await this.open(niivue);
      if (this.abort.signal.aborted) return this.close();
      const [low, high] = this.preset();
      const images = [{ url: volume, colormap: "gray", cal_min: low, cal_max: high, colorbarVisible: false }];
      if (std) images.push({ url: std, colormap: "inferno", cal_min: 0, cal_max: stdMaxHU, opacity: 0 });
      const { nv } = this;
      await nv.loadVolumes(images);
      if (shown !== files) return;
      this.querySelector(".overlay").hidden = !std;
      this.querySelector("[name=std]").checked = false;
      nv.opts.isColorbar = false;
      nv.clearAllMeasurements();
      for (const [axis, plane] of PLANES.entries()) {
        this.querySelector(`[name=${plane}]`).max = this.size[axis] - 1;
      }
      this.dataset.state = "ready";
      this.moveTo(this.size.map((count) => Math.floor(count / 2)));
    } catch (error) {
      if (shown !== files) return;
      console.warn(`raylift: the volume is shown as slices: ${error.message}`);
      this.fallBack();
    }
  }

  async open(niivue) {
    this.niivue = niivue;
    const nv = new niivue.Niivue({
      backColor: [0, 0, 0, 1],
      crosshairColor: [0.22, 0.74, 0.97, 1],
      crosshairWidth: 0.25,
      crosshairWidthUnit: "percent",
      crosshairGap: 8,
      dragAndDropEnabled: false,
      fontColor: [0.89, 0.91, 0.94, 1],
      isOrientCube: false,
      isRadiologicalConvention: true,
      logLevel: "error",
      measureLineColor: [0.98, 0.8, 0.08, 1],
      measureTextColor: [0.98, 0.8, 0.08, 1],
      multiplanarPadPixels: 6,
      multiplanarShowRender: niivue.SHOW_RENDER.ALWAYS,
      multiplanarLayout: niivue.MULTIPLANAR_TYPE.GRID,
      sagittalNoseLeft: true,
      show3Dcrosshair: true,
      showAllOrientationMarkers: true,
      viewModeHotKey: "",
      clipPlaneHotKey: "",
      cycleClipPlaneHotKey: "",
    });
    nv.onLocationChange = (location) => this.onLocation(location);
    const draw = nv.drawScene.bind(nv);
    nv.drawScene = () => {
      draw();
      this.onDraw();
    };
    nv.onDragRelease = ({ mmLength }) => this.onDistance(mmLength);
    await nv.attachToCanvas(this.canvas);
    await nv.setVolumeRenderIllumination(0.6);
    await nv.setGradientOpacity(0.3);
    this.nv = nv;
    this.setDrag(this.querySelector("[name=drag]:checked").value);
    this.setLayout(this.querySelector("[name=layout]").value);
  }

  /** Voxels along right, anterior and superior. */
  get size() {
    return this.nv.volumes[0].dimsRAS.slice(1, 4);
  }

  preset() {
    const { low, high } = (this.querySelector("[name=preset]:checked") ?? this.querySelector("[name=preset]")).dataset;
    return [Number(low), Number(high)];
  }

  setWindow([low, high]) {
    Object.assign(this.nv.volumes[0], { cal_min: low, cal_max: high });
    this.nv.updateGLVolume();
  }

  setDrag(name) {
    const { [DRAG[name]]: mode, pan, windowing } = this.niivue.DRAG_MODE;
    this.nv.setMouseEventConfig({
      leftButton: { primary: mode, withShift: windowing, withCtrl: pan },
      rightButton: windowing,
      centerButton: pan,
    });
    this.nv.setTouchEventConfig({ singleTouch: mode, doubleTouch: pan });
  }

  setLayout(name) {
    this.nv.setSliceType(this.niivue.SLICE_TYPE[name.toUpperCase()]);
  }

  /** Move the crosshair to the center of a voxel, counted along right, anterior and superior. */
  moveTo(voxel) {
    this.nv.scene.crosshairPos = voxel.map((index, axis) => (index + 0.5) / this.size[axis]);
    this.nv.createOnLocationChange();
    this.nv.drawScene();
  }

  /** The voxel of the crosshair, counted along right, anterior and superior. */
  get voxel() {
    const { crosshairPos } = this.nv.scene;
    return this.size.map((count, axis) => Math.min(Math.max(Math.floor(crosshairPos[axis] * count), 0), count - 1));
  }

  onKey(event) {
    const step = STEPS[event.key];
    if (!step || !this.ready || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const factor = event.shiftKey ? 5 : 1;
    const target = this.voxel.map((index, axis) => index + factor * step[axis]);
    this.moveTo(target.map((index, axis) => Math.min(Math.max(index, 0), this.size[axis] - 1)));
  }

  onPointer(event) {
    if (!this.ready) return;
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    const fraction = this.nv.canvasPos2frac([(event.clientX - box.left) * scale, (event.clientY - box.top) * scale]);
    const inside = fraction[0] >= 0;
    this.write("pointer", inside ? `Pointer: ${this.values(this.nv.frac2mm(fraction))}` : "");
  }

  onInput(control) {
    if (!this.ready) return;
    if (control.name === "preset") this.setWindow(this.preset());
    if (control.name === "drag") this.setDrag(control.value);
    if (control.name === "layout") this.setLayout(control.value);
    if (control.name === "std") {
      this.nv.opts.isColorbar = control.checked;
      this.nv.setOpacity(1, control.checked ? 0.7 : 0);
    }
    const axis = PLANES.indexOf(control.name);
    if (axis >= 0) {
      this.moveTo(this.voxel.map((index, k) => (k === axis ? this.size[k] - 1 - control.value : index)));
    }
  }

  onClick(button) {
    if (!this.ready || !button) return;
    if (button.name === "full-screen") {
      if (document.fullscreenElement) document.exitFullscreen();
      else this.requestFullscreen();
    }
    if (button.name === "reset") {
      this.querySelector("[name=preset]").checked = true;
      this.nv.clearAllMeasurements();
      this.write("distance", "");
      this.nv.scene.pan2Dxyzmm = [0, 0, 0, 1];
      this.nv.volScaleMultiplier = 1;
      this.setWindow(this.preset());
      this.moveTo(this.size.map((count) => Math.floor(count / 2)));
    }
  }

  onLocation({ mm }) {
    if (!this.ready) return;
    for (const [axis, plane] of PLANES.entries()) {
      this.querySelector(`[name=${plane}]`).value = this.size[axis] - 1 - this.voxel[axis];
    }
    this.write("crosshair", `Crosshair: ${this.values(mm)}`);
  }

  /** What follows from the drawn planes: NiiVue's own scale bar is missing in radiological convention. */
  onDraw() {
    if (!this.ready) return;
    const plane = this.nv.screenSlices.find(({ axCorSag }) => axCorSag !== this.niivue.SLICE_TYPE.RENDER);
    const bar = this.querySelector(".scale-bar");
    bar.hidden = !plane;
    if (plane) {
      const scale = plane.leftTopWidthHeight[2] / Math.abs(plane.fovMM[0]) / this.nv.uiData.dpr;
      bar.style.width = `${100 * scale}px`;
    }
    this.onWindow();
  }

  onWindow() {
    const { cal_min: low, cal_max: high } = this.nv.volumes[0];
    for (const preset of this.querySelectorAll("[name=preset]")) {
      preset.checked = Number(preset.dataset.low) === low && Number(preset.dataset.high) === high;
    }
    this.write("window", `Window ${Math.round(high - low)} / ${Math.round((low + high) / 2)} HU`);
  }

  onDistance(length) {
    const measures = this.querySelector("[name=drag]:checked").value === "distance";
    if (this.ready && measures && length > 0) this.write("distance", `Distance ${length.toFixed(1)} mm`);
  }

  /** Position in mm by patient direction, and the values of its voxel. */
  values(mm) {
    const position = ["RL", "AP", "SI"].map(
      ([positive, negative], axis) => `${mm[axis] < 0 ? negative : positive} ${Math.abs(mm[axis]).toFixed(0)}`,
    );
    const [hu, std] = this.nv.volumes.map((volume) => volume.getValue(...volume.mm2vox(mm)));
    const spread = std === undefined ? "" : `, standard deviation ${std} HU`;
    return `${hu} HU${spread} at ${position.join(", ")} mm`;
  }

  get ready() {
    return this.dataset.state === "ready";
  }
}

customElements.define("raylift-viewer", Viewer);
if (hasWebGL2()) document.documentElement.classList.add(WITH_WEBGL);

/** Show a volume, and its standard deviation over samples if there is one: files as Gradio describes them. */
globalThis.rayliftShow = (volume, std = null, stdMaxHU = 0) => {
  shown = { volume: volume.url, std: std?.url, stdMaxHU };
  if (!document.documentElement.classList.contains(WITH_WEBGL)) return;
  for (const viewer of document.querySelectorAll("raylift-viewer")) viewer.show();
};
